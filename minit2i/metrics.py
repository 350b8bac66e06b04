"""How good tokenizers and priors are, measured without a network where the data allows it.

python -m minit2i.metrics scenes --model out/prior
python -m minit2i.metrics recall --model out/prior --prompts emoji/compose --among emoji/train
python -m minit2i.metrics rerank --model out/prior --n 16 --captioner out/captioner
python -m minit2i.metrics captions --model out/captioner
python -m minit2i.metrics enlarge --model out/larger --images path/to/pictures
python -m minit2i.metrics tokenizer --model out/vq --images path/to/pictures
python -m minit2i.metrics fid --real path/to/pictures --fake out/pictures --features out/vq

Shapes: B batch, H W picture, V codebook size.
"""

import contextlib
import json
import re
import statistics
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from minit2i.backbones import shrink
from minit2i.checkpoint import read_config, write_file
from minit2i.data import BadEntry, DataConfig, crop, grid_image, open_source, parse_size, to_pil
from minit2i.fid import batches, features, fid, frechet, moments, pick_features, picture_set
from minit2i.flags import add_flags, count, new_parser, pick
from minit2i.oracle import check_scene, score_scenes
from minit2i.sample import PRETRAINED, Painter, SampleConfig, code_losses, load_vq
from minit2i.scenes import CATEGORIES, caption, read_caption, render, scene_at
from minit2i.train import pick_device, run, save_image

# --- pictures against pictures -----------------------------------------------------------------------


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of each picture: a, b (B, 3, H, W) in [-1, 1] -> (B,)."""
    mse = (a.float() - b.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / mse.clamp_min(1e-10))


def ssim(a, b):
    """Structural similarity of each picture: a, b (B, 3, H, W) in [-1, 1] -> (B,).

    Windows of 11x11 under a Gaussian of 1.5 pixels that lie wholly inside, each channel by itself.
    Wang et al. 2004, "Image quality assessment", sec. III (there on gray pictures).  ValueError below 11 pixels.
    """
    if min(a.shape[-2:]) < 11:
        raise ValueError(
            f"SSIM looks at windows of 11x11 pixels; pictures of {a.shape[-2]}x{a.shape[-1]} are too small"
        )
    a, b = a.float(), b.float()
    window = torch.exp(-((torch.arange(11, device=a.device) - 5.0) ** 2) / (2 * 1.5**2))
    window = window / window.sum()

    def blur(x):  # (B, 3, H, W) -> (B, 3, H-10, W-10)
        x = F.conv2d(x, window.view(1, 1, 11, 1).expand(3, 1, 11, 1), groups=3)
        return F.conv2d(x, window.view(1, 1, 1, 11).expand(3, 1, 1, 11), groups=3)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, both = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # of the range, which is 2
    value = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return value.flatten(1).mean(1)


def roughness(a):
    """How much neighbouring pixels differ, on average over each picture: a (B, 3, H, W) -> (B,).  Blur lowers it."""
    return sum(a.float().diff(dim=d).abs().flatten(1).mean(1) for d in (2, 3))


def code_stats(counts):
    """How often each code was used (V,) -> fraction of codes used at all, perplexity exp(entropy)."""
    counts = counts.cpu().double()
    share = counts / counts.sum().clamp_min(1)
    entropy = -(share * share.clamp_min(1e-12).log()).sum()
    return float((counts > 0).double().mean()), float(entropy.exp())


# --- tokenizers --------------------------------------------------------------------------------------


@torch.no_grad()
def tokenizer_figures(vq, crops, extract, folder):
    """PSNR, SSIM, sharpness (roughness beside the pictures' own), use of codes and rFID on pictures (Crops) -> dict."""

    def encode(images):
        return vq.encode(shrink(images.to(next(vq.parameters()).device), vq.cfg.upscale))

    sums, counts = torch.zeros(5, dtype=torch.float64), torch.zeros(vq.cfg.n_codes)
    for images in batches(crops):
        codes = encode(images)
        again = vq.decode(codes).cpu()
        counts += torch.bincount(codes.flatten(), minlength=len(counts)).cpu()
        values = psnr(again, images), ssim(again, images), roughness(again), roughness(images), torch.ones(len(images))
        sums += torch.stack([v.sum() for v in values])
    drawn = features(extract, crops, folder, lambda images: vq.decode(encode(images)), vq.hash)
    rows = [features(extract, crops, folder), drawn]
    use, perplexity = code_stats(counts)
    figures = {"psnr": float(sums[0] / sums[4]), "ssim": float(sums[1] / sums[4])}
    figures |= {"sharpness": float(sums[2] / sums[3]), "code_use": use, "perplexity": perplexity}
    figures |= {"rFID": frechet(*moments(rows[0]), *moments(rows[1])), "n": int(sums[4])}
    return figures | {"features": extract.name}


# --- a prior on generated scenes ---------------------------------------------------------------------


def scene_prompts(category, held_out, n, seed=1_000_003):
    """n prompts of a category with their claims, from a seed that training does not use -> [(caption, claim, scene)]."""
    prompts = []
    for k in range(n):
        scene = scene_at(seed, k, category=category, held_out=held_out)
        prompts.append((*caption(scene, np.random.default_rng((seed, k, 1))), scene))
    return prompts


def scene_accuracy(painter, cfg, n=500, batch=64, say=print):
    """Accuracy by category of one picture for each of n prompts, seen and held-out combinations apart.

    painter: sample.Painter; cfg: SampleConfig -> {"seen": {category: accuracy, "overall": mean}, "held_out": ...,
    "tokenizer": ...}; the tokenizer's row is the oracle on true renders of the seen prompts that went through the
    tokenizer and back, which no prior can beat by more than luck.
    """
    table, done = {}, 0
    for split, held_out in (("seen", False), ("held_out", True)):
        results, roundtrip = [], []
        for category in CATEGORIES:
            prompts = scene_prompts(category, held_out, n)
            drawn = painter.paint([p[0] for p in prompts], replace(cfg, n=1, seed=cfg.seed + done), batch)
            done += n
            for (_, images), (_, claim, _) in zip(drawn, prompts):
                results.append((category, check_scene(to_pil(images[0]), claim, category)))
            for first in () if held_out else range(0, n, batch):
                some = prompts[first : first + batch]
                images = torch.stack([crop(render(scene, *painter.size), painter.size) for _, _, scene in some])
                images = painter.vq.decode(painter.vq.encode(images.to(painter.device)))
                for image, (_, claim, _) in zip(images, some):
                    roundtrip.append((category, check_scene(to_pil(image), claim, category)))
            say(f"{split:8} {category:18} {score_scenes(results)[category]:.1%}")
        table[split] = score_scenes(results)
        if not held_out:
            table["tokenizer"] = score_scenes(roundtrip)
    return table


def seconds_a_picture(painter, prompt, cfg, times=3):
    """Median time to draw one picture alone, after a first one that does not count."""
    taken = []
    for _ in range(times + 1):
        start = time.perf_counter()
        list(painter.paint([prompt], cfg))
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def reranking(painter, cfg, judges, n=50):
    """Accuracy on seen scenes of the best of the first k of cfg.n pictures, for k 1, 4, 16, ... up to cfg.n.

    judges: {name of a score: what it comes from, see sample.code_losses}; n: prompts of each category, evenly many.
    Returns {name: {k: accuracy}}; "any" is how often one of the k is right, which no score can beat.
    """
    right, loss = [], {name: [] for name in judges}
    for category in CATEGORIES:
        prompts = scene_prompts(category, False, n)
        drawn = painter.draw(enumerate((p[0] for p in prompts), len(right)), cfg)
        for (_, text, codes), (_, claim, _) in zip(drawn, prompts):
            right.append([check_scene(to_pil(image), claim, category) for image in painter.images(codes)])
            for name, judge in judges.items():
                loss[name].append(code_losses(painter, judge, text, codes))
    right, counts = torch.tensor(right).float(), [4**i for i in range(10) if 4**i <= cfg.n]
    table = {"any": {k: float(right[:, :k].amax(1).mean()) for k in counts}}
    for name, rows in loss.items():
        best = {k: torch.stack(rows)[:, :k].argmin(1, keepdim=True).cpu() for k in counts}
        table[name] = {k: float(right.gather(1, best[k]).mean()) for k in counts}
    return table


def scene_captions(painter, cfg, n=20):
    """A captioner describes n seen scenes of each category -> [(category, whether all that it says is true, caption)]."""
    rows = []
    for category in CATEGORIES:
        scenes = [scene for *_, scene in scene_prompts(category, False, n)]
        images = torch.stack([crop(render(scene, *painter.size), painter.size) for scene in scenes])
        for image, (text, *_) in zip(images, painter.captions(images, replace(cfg, n=1))):
            claim = read_caption(text)
            rows.append((category, claim is not None and check_scene(to_pil(image), claim), text))
    return rows


# --- a prior that enlarges -----------------------------------------------------------------------------


def captioned(source, indices, painter):
    """Those entries of a source that can be read, at a prior's size -> ([image (3, H, W)], [first caption]); a skip is named."""
    images, captions = [], []
    for i in indices:
        try:
            text, image = source.captions(i)[0], source.picture(i)
            images.append(crop(image, painter.size, painter.config["data"]["resize"]))
            captions.append(text)
        except BadEntry as e:
            print(f"skipped {source.key(i)}: {e}")
    if not images:
        raise ValueError(f"none of the {len(source)} pictures has a caption and can be read, {source.key(0)} for one")
    return images, captions


@torch.inference_mode()
def enlarging(painter, cfg, source, n, batch=16, shown=8):
    """The first n captioned pictures of a source, each shrunk, encoded and enlarged again -> {way: figures}, PIL image.

    "bicubic": the small picture, decoded and interpolated; "drawn": by the prior, from the small picture's codes and its
    caption; "tokenizer": the large picture through the tokenizer and back, which no prior can beat by more than luck.
    Figures: psnr in dB, and sharpness, roughness beside the pictures' own.  The image has a row for each way, and the
    pictures themselves last.
    """
    f, ways = painter.prior.cfg.low, ("bicubic", "drawn", "tokenizer")
    if not f:
        raise ValueError("this prior does not enlarge pictures; train one with --low 2")
    images, captions = captioned(source, range(min(n, len(source))), painter)
    rows, sums = [], torch.zeros(len(ways) + 1, 2, dtype=torch.float64)

    def decoded(codes):
        return shrink(painter.images(codes), painter.vq.cfg.upscale)

    for first in range(0, len(images), batch):
        some = torch.stack(images[first : first + batch]).to(painter.device)
        low = painter.vq.encode(shrink(some, f))
        drawn = painter.codes(captions[first : first + batch], replace(cfg, n=1, seed=cfg.seed + first), low=low)
        small = F.interpolate(decoded(low), some.shape[2:], mode="bicubic").clamp(-1, 1)
        row = small, decoded(drawn), decoded(painter.vq.encode(some)), some
        sums += torch.tensor([[psnr(x, some).sum(), roughness(x).sum()] for x in row])
        rows.append(torch.stack(row)[:, : max(0, shown - first)])
    figures = {
        way: {"psnr": float(db) / len(images), "sharpness": float(rough / sums[-1, 1])}
        for way, (db, rough) in zip(ways, sums)
    }
    sheet = torch.cat(rows, 1)  # (4, shown, 3, H, W)
    return figures | {"n": len(images)}, grid_image(sheet.flatten(0, 1), sheet.shape[1])


# --- a prior on captions that compose ----------------------------------------------------------------


@torch.no_grad()
def picture_latents(painter, images, batch=64):
    """images (B, 3, H, W) -> the tokenizer's latents before quantization, flattened (B, h*w*C)."""
    parts = [painter.vq.latents(images[k : k + batch].to(painter.device)) for k in range(0, len(images), batch)]
    return torch.cat(parts).flatten(1).float()


TONE = r" with .*skin tone$"  # what of an emoji's caption is not its concept


def recall(painter, cfg, prompts, among=(), ignore=TONE):
    """Draw one picture per caption of a folder; is the nearest of many pictures the caption's own?

    prompts: folder of captioned pictures, each caption a prompt; among: further folders whose pictures compete.
    Nearest by L2 between tokenizer latents.  Returns {"own": rate, "concept": rate, "n", "pictures"}: the nearest
    picture is the caption's own, or has the same caption once the part that `ignore` matches is taken away;
    and [(prompt, nearest caption)].
    """
    try:
        re.compile(ignore)
    except re.error as e:
        raise ValueError(f"--ignore {ignore!r} is no pattern: {e}") from None
    data = pick(DataConfig, painter.config["data"])
    sources = [open_source(folder, data) for folder in (prompts, *among)]
    sets = [captioned(source, range(len(source)), painter) for source in sources]
    (images, captions), n = (sum(parts, []) for parts in zip(*sets)), len(sets[0][0])
    known = picture_latents(painter, torch.stack(images))
    drawn = torch.cat([im for _, im in painter.paint(captions[:n], replace(cfg, n=1), bar=True)])
    drawn = shrink(drawn, painter.vq.cfg.upscale)
    nearest = torch.cdist(picture_latents(painter, drawn), known).argmin(1).tolist()

    def concept(text):
        return re.sub(ignore, "", text) if ignore else text

    own = sum(i == k for k, i in enumerate(nearest)) / n
    same = sum(concept(captions[i]) == concept(captions[k]) for k, i in enumerate(nearest)) / n
    pairs = [(captions[k], captions[i]) for k, i in enumerate(nearest)]
    return {"own": own, "concept": same, "n": n, "pictures": len(images)}, pairs


# --- the commands ------------------------------------------------------------------------------------


def first_size(source):
    """Size of the first picture that can be read, as --size."""
    for i in range(len(source)):
        with contextlib.suppress(BadEntry):
            return "{1}x{0}".format(*source.picture(i).size)
    raise ValueError(f"none of the {len(source)} pictures can be read, {source.key(0)} for one")


def drawn_by(source):
    """Model hash and settings that sample.py wrote into the first picture of a folder; {} if it did not."""
    try:
        with Image.open(source.paths[0]) as im:
            return {k: im.info[k] for k in ("model", "settings") if k in im.info}
    except (AttributeError, OSError):  # shards, scenes
        return {}


def make_parser():
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    scenes = commands.add_parser("scenes", help="a prior's accuracy on generated scenes, by category")
    scenes.add_argument("--prompts_per_category", type=count, default=500)
    compose = commands.add_parser("recall", help="how often the picture drawn for a caption is nearest to its own")
    compose.add_argument("--prompts", required=True, help="folder of captioned pictures")
    compose.add_argument("--among", nargs="*", default=[], help="further folders whose pictures compete")
    compose.add_argument("--ignore", default=TONE, help="what of a caption is not the concept: a pattern")
    rerank = commands.add_parser("rerank", help="what choosing the best of --n pictures of a scene gains, by score")
    rerank.add_argument("--prompts_per_category", type=count, default=50)
    rerank.add_argument("--captioner", help="a prior of --order image, for the loss of the caption (CapLoss)")
    rerank.add_argument("--towers", help="a model of --objective contrast")
    reading = commands.add_parser("captions", help="how often what a captioner says of a scene is true")
    reading.add_argument("--prompts_per_category", type=count, default=20)
    larger = commands.add_parser(
        "enlarge", help="PSNR of pictures enlarged by a prior of --low, beside bicubic interpolation"
    )
    larger.add_argument("--images", required=True, help="captioned pictures: a folder, tar shards, or 'scenes'")
    larger.add_argument("--pictures", type=count, default=32, help="how many of them, the first [32]")
    larger.add_argument(
        "--show", help="write the first 8 to this PNG: interpolated, drawn, through the tokenizer, as they are"
    )
    for command in (scenes, compose, rerank, reading, larger):
        command.add_argument("--model", default=str(PRETRAINED), help="folder of a prior [the one that ships]")
        add_flags(command, SampleConfig)
    tokenizer = commands.add_parser("tokenizer", help="PSNR, SSIM, code use and rFID of a tokenizer")
    tokenizer.add_argument("--model", required=True, help="checkpoint folder of a tokenizer")
    tokenizer.add_argument("--images", required=True, help="pictures: a folder, tar shards, or 'scenes'")
    sets = commands.add_parser("fid", help="FID of two sets of pictures over blur radii, and IS of the second")
    sets.add_argument("--real", required=True, help="pictures: a folder, tar shards, or 'scenes'")
    sets.add_argument("--fake", required=True, help="pictures to judge, as sample.py writes them into a folder")
    sets.add_argument("--radii", type=int, nargs="+", default=[0, 1, 2, 4, 8], help="blurs in pixels [0 1 2 4 8]")
    for command in (tokenizer, sets):
        add = command.add_argument
        add(
            "--features",
            default="inception",
            help="'inception', a file of its weights, or a folder: a tokenizer's or two towers'",
        )
        add("--size", default="", help="crop to 64 or HEIGHTxWIDTH [the tokenizer's, the first fake's]")
        add("--n", type=int, default=0, help="look at the first n pictures; 0: all [0]")
        add("--cache", default="out/cache", help="where features are kept [out/cache]")
        add("--workers", type=int, default=2, help="loader processes [2]")
    for command in commands.choices.values():
        command.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
        command.add_argument("--out", help="write the figures, settings and model hash to this JSON file")
    return parser


def measure_prior(args):
    """scenes, recall, rerank, captions, enlarge -> the record to write."""
    device, cfg, more = pick_device(args.device), pick(SampleConfig, args), {}
    if args.command != "rerank":
        if cfg.n != SampleConfig.n:
            raise ValueError(f"--n {cfg.n} is for rerank; {args.command} draws one picture a prompt")
        cfg = replace(cfg, n=1)
    painter = Painter(args.model, device)
    if (args.command == "captions") != (painter.prior.cfg.order == "image"):
        raise ValueError(f"{args.model}: captions needs a prior of --order image, and all others one of --order text")
    if args.command == "rerank":
        judges = {} if painter.prior.masked else {"likelihood": None}  # a masked prior has none
        if args.captioner:
            judges["caploss"] = Painter(args.captioner, device)
        if args.towers:
            judges["contrastive"] = Painter(args.towers, device, kind="contrast")
        figures = reranking(painter, cfg, judges, args.prompts_per_category)
        for name, row in figures.items():
            print(f"{name:12}" + "".join(f" best of {k}: {accuracy:.1%} " for k, accuracy in row.items()))
    elif args.command == "scenes":
        figures = scene_accuracy(painter, cfg, args.prompts_per_category)
        for row, scores in figures.items():
            print(f"{row:10}" + "".join(f" {name} {value:.1%} " for name, value in scores.items()))
        more["seconds_a_picture"] = seconds_a_picture(painter, scene_prompts("counting", False, 1)[0][0], cfg)
        print(f"{more['seconds_a_picture']:.3f} s for a picture alone")
    elif args.command == "captions":
        rows = scene_captions(painter, cfg, args.prompts_per_category)
        for category, true, text in rows:
            print(f"{category:18} {'true ' if true else 'false'} {text}")
        figures = score_scenes((category, true) for category, true, _ in rows)
        print("true: " + ", ".join(f"{name} {value:.1%}" for name, value in figures.items()))
    elif args.command == "enlarge":
        source = open_source(args.images, pick(DataConfig, painter.config["data"]))
        figures, sheet = enlarging(painter, cfg, source, args.pictures)
        for way, its in figures.items():
            print(
                f"{way:10} {its['psnr']:.2f} dB, sharpness {its['sharpness']:.2f}" if way != "n" else f"{its} pictures"
            )
        if args.show:
            save_image(args.show, sheet)
    else:
        figures, pairs = recall(painter, cfg, args.prompts, args.among, args.ignore)
        for prompt, found in pairs:
            print(f"{prompt}  ->  {found}")
        own, concept = (f"{figures[k]:.1%}" for k in ("own", "concept"))
        among = f"of {figures['n']} captions, among {figures['pictures']} pictures"
        print(f"own picture {own}, right concept {concept} {among}")
    return {"figures": figures, "settings": asdict(cfg), "model": painter.hash} | more


def measure_pictures(args):
    """tokenizer, fid -> the record to write."""
    extract = pick_features(args.features, pick_device(args.device))
    settings = {k: getattr(args, k) for k in ("features", "size", "n")}
    if args.command == "tokenizer":
        vq = load_vq(args.model, extract.device)
        size = parse_size(args.size or read_config(args.model)["data"]["size"])  # of what it encodes
        settings["size"] = "x".join(str(n * vq.cfg.upscale) for n in size)
        crops = picture_set(args.images, settings["size"], args.n, args.workers)
        figures = tokenizer_figures(vq, crops, extract, args.cache)
        record = {"settings": settings | {"images": args.images}, "model": vq.hash}
    else:
        source = open_source(args.fake, DataConfig(size=args.size or "64"))
        settings["size"] = args.size or first_size(source)
        real, fake = (picture_set(s, settings["size"], args.n, args.workers) for s in (args.real, args.fake))
        figures = fid(extract, real, fake, args.cache, args.radii)
        record = {"settings": settings | {"real": args.real, "fake": args.fake}, "drawn_by": drawn_by(source)}
        if min(figures["n_real"], figures["n_fake"]) <= extract.width:
            print(f"note: with no more pictures than the {extract.width} features FID comes out too high")
    for name, value in figures.items():
        print(f"{name:12} {value:.4g}" if isinstance(value, float) else f"{name:12} {value}")
    return {"figures": figures, "features_hash": extract.hash} | record


def main():
    args = make_parser().parse_args()
    record = (measure_pictures if "features" in args else measure_prior)(args)
    if args.out:
        write_file(args.out, json.dumps(record | {"command": " ".join(sys.argv)}, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
