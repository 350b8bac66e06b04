"""Measure priors and tokenizers; without a network where the data allows it.

python -m minit2i.experiments.evaluate scenes --model out/prior
python -m minit2i.experiments.evaluate recall --model out/prior --prompts emoji/compose --among emoji/train
python -m minit2i.experiments.evaluate rerank --model out/prior --n 16 --judges out/captioner,out/towers
python -m minit2i.experiments.evaluate captions --model out/captioner
python -m minit2i.experiments.evaluate enlarge --model out/larger --images path/to/images
python -m minit2i.experiments.evaluate tokenizer --model out/vq --images path/to/images --show grid.png
python -m minit2i.experiments.evaluate fid --real path/to/images --fake out/images --features out/vq

Shapes: B batch, H W image, P prompts, n images per prompt, h w code grid.
"""

import argparse
import contextlib
import json
import re
import statistics
import sys
import time
from dataclasses import asdict, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from minit2i.checkpoint import check_writable, load_vq, read_config, write_file
from minit2i.config import merge, pick
from minit2i.data import DataConfig, crop, open_source, parse_size
from minit2i.experiments.fid import batches, features, fid, frechet, image_set, moments, pick_features
from minit2i.experiments.oracle import check_scene, score_scenes
from minit2i.experiments.tokenizers import quality, tokenizer_grid
from minit2i.flags import add_flags, count, new_parser
from minit2i.gpt import MODELS
from minit2i.metrics import psnr, sharpness
from minit2i.papers.cogview import Captioner
from minit2i.plot import grid_image, save_image, to_pil
from minit2i.sample import Pipeline, SampleConfig, score_codes
from minit2i.scenes import CATEGORIES, caption, read_caption, render, scene_at
from minit2i.sources import BadEntry
from minit2i.train import pick_device, run
from minit2i.vq import shrink

# --- a prior on generated scenes ---------------------------------------------------------------------


def scene_prompts(category, held_out, n, seed=1_000_003):
    """n prompts of a category, from a seed that training does not use -> [(caption, claim, scene)]."""
    prompts = []
    for k in range(n):
        scene = scene_at(seed, k, category=category, held_out=held_out)
        prompts.append((*caption(scene, np.random.default_rng((seed, k, 1))), scene))
    return prompts


def rendered(scenes, pipe):
    """Scenes -> their true images at the prior's size (B, 3, H, W)."""
    return torch.stack([crop(render(scene, *pipe.size), pipe.size) for scene in scenes])


def scene_accuracy(pipe, cfg, n=500, batch=64, say=print, splits=("seen", "held_out")):
    """Accuracy per category on n prompts, one image each, seen and held-out combinations separately.

    Returns {"seen": {category: accuracy, "overall": mean}, "held_out": ..., "tokenizer": ...}.  "tokenizer" is the
    oracle's accuracy on true renders of the seen prompts after encoding and decoding, the ceiling of any prior.
    """
    table, done = {}, 0
    for split in splits:
        held_out = split == "held_out"
        results, roundtrip = [], []
        for category in CATEGORIES:
            prompts = scene_prompts(category, held_out, n)
            generated = pipe([p[0] for p in prompts], replace(cfg, n=1, seed=cfg.seed + done), batch)
            done += n
            for (_, images), (_, claim, _) in zip(generated, prompts):
                results.append((category, check_scene(to_pil(images[0]), claim, category)))
            for first in () if held_out else range(0, n, batch):
                some = prompts[first : first + batch]
                images = rendered([scene for *_, scene in some], pipe).to(pipe.device)
                for image, (_, claim, _) in zip(pipe.vq.decode(pipe.vq.encode(images)), some):
                    roundtrip.append((category, check_scene(to_pil(image), claim, category)))
            say(f"{split:8} {category:18} {score_scenes(results)[category]:.1%}")
        table[split] = score_scenes(results)
        if not held_out:
            table["tokenizer"] = score_scenes(roundtrip)
    return table


def seconds_per_image(pipe, prompt, cfg, times=3):
    """Median time to sample one image alone, after one warm-up."""
    taken = []
    for _ in range(times + 1):
        start = time.perf_counter()
        list(pipe([prompt], cfg))
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def reranking(pipe, cfg, judges, n=50):
    """Accuracy on held-out scenes of the best of the first k of cfg.n images, for k = 1, 4, 16, ... up to cfg.n.

    Of seen scenes a good prior's first image is right already.
    judges: {name of a score: judge, see sample.score_codes}; n: prompts per category.  Returns {name: {k: accuracy}};
    "any" is how often one of the k images is right, the ceiling of any score.
    """
    right, loss = [], {name: [] for name in judges}
    for category in CATEGORIES:
        for text, claim, _ in scene_prompts(category, True, n):
            first = cfg.seed + len(right) * cfg.n
            codes = pipe.sample_codes([text], cfg, seeds=range(first, first + cfg.n))  # (n, h, w)
            right.append([check_scene(to_pil(image), claim, category) for image in pipe.decode(codes)])
            for name, judge in judges.items():
                loss[name].append(score_codes(pipe, judge, text, codes))
    right, counts = torch.tensor(right).float(), [4**i for i in range(10) if 4**i <= cfg.n]
    table = {"any": {k: float(right[:, :k].amax(1).mean()) for k in counts}}
    for name, rows in loss.items():
        best = {k: torch.stack(rows)[:, :k].argmin(1, keepdim=True).cpu() for k in counts}
        table[name] = {k: float(right.gather(1, best[k]).mean()) for k in counts}
    return table


def scene_captions(pipe, cfg, n=20):
    """A captioner describes n seen scenes per category -> [(category, whether everything it says is true, caption)]."""
    rows = []
    for category in CATEGORIES:
        scenes = [scene for *_, scene in scene_prompts(category, False, n)]
        images = rendered(scenes, pipe)
        for image, (text, *_) in zip(images, pipe.captions(images, replace(cfg, n=1))):
            claim = read_caption(text)
            rows.append((category, claim is not None and check_scene(to_pil(image), claim), text))
    return rows


# --- a prior that enlarges -----------------------------------------------------------------------------


def captioned(source, indices, pipe):
    """Readable entries of a source at the prior's size -> ([image (3, H, W)], [first caption]); prints the others."""
    images, captions = [], []
    for i in indices:
        try:
            text, image = source.captions(i)[0], source.image(i)
            images.append(crop(image, pipe.size, pipe.config["data"]["resize"]))
            captions.append(text)
        except BadEntry as e:
            print(f"skipped {source.key(i)}: {e}")
    if not images:
        raise ValueError(f"none of the {len(source)} images can be read and has a caption, {source.key(0)} for one")
    return images, captions


@torch.inference_mode()
def enlarging(pipe, cfg, source, n, batch=16, shown=8):
    """Shrink, encode and enlarge the first n captioned images of a source -> {way: figures}, grid as PIL image.

    "bicubic": the small image, decoded and interpolated; "sampled": from the small image's codes and its caption;
    "tokenizer": the large image encoded and decoded, the ceiling of any prior.  Figures: psnr in dB, and sharpness
    relative to the originals.  The grid has a row for each way, then the originals.
    """
    ways, view, smaller = ("bicubic", "sampled", "tokenizer"), pipe.view, pipe.view_vq
    if not view or view.ratio == 1:
        raise ValueError("this prior does not enlarge images; train one with --condition text,coarse")
    images, captions = captioned(source, range(min(n, len(source))), pipe)
    rows, sums = [], torch.zeros(len(ways) + 1, 2, dtype=torch.float64)

    def decoded(codes):
        return shrink(pipe.decode(codes), pipe.vq.cfg.upscale)

    for first in range(0, len(images), batch):
        some = torch.stack(images[first : first + batch]).to(pipe.device)
        coarse, prompts = smaller.encode(view.f(some)), captions[first : first + batch]
        codes = pipe.sample_codes(prompts, replace(cfg, n=1, seed=cfg.seed + first), coarse=coarse)
        small = shrink(smaller.decode(coarse), smaller.cfg.upscale)
        small = F.interpolate(small, some.shape[2:], mode="bicubic").clamp(-1, 1)
        row = small, decoded(codes), decoded(pipe.vq.encode(some)), some
        sums += torch.tensor([[psnr(x, some).sum(), sharpness(x).sum()] for x in row])
        rows.append(torch.stack(row)[:, : max(0, shown - first)])
    figures = {
        way: {"psnr": float(db) / len(images), "sharpness": float(steps / sums[-1, 1])}
        for way, (db, steps) in zip(ways, sums)
    }
    grid = torch.cat(rows, 1)  # (4, shown, 3, H, W)
    return figures | {"n": len(images)}, grid_image(grid.flatten(0, 1), grid.shape[1])


# --- a prior on captions that compose ----------------------------------------------------------------


@torch.no_grad()
def image_latents(pipe, images, batch=64):
    """images (B, 3, H, W) -> the tokenizer's latents before quantization, flattened (B, h*w*C)."""
    parts = [pipe.vq.latents(part.to(pipe.device)) for part in images.split(batch)]
    return torch.cat(parts).flatten(1).float()


TONE = r" with .*skin tone$"  # the part of an emoji's caption that is not its concept


def recall(pipe, cfg, prompts, among=(), ignore=TONE):
    """Sample one image per caption of a folder: is the nearest of many images the caption's own?

    prompts: folder of captioned images, each caption a prompt; among: further folders whose images compete.  Nearest
    by L2 between tokenizer latents.  Returns {"own": rate, "concept": rate, "n", "images"}, [(prompt, nearest
    caption)]: the nearest image is the caption's own, or its caption is the same without the part that `ignore`
    matches.
    """
    try:
        re.compile(ignore)
    except re.error as e:
        raise ValueError(f"--ignore {ignore!r} is not a regular expression: {e}") from None
    data = pick(DataConfig, pipe.config["data"])
    sources = [open_source(folder, data) for folder in (prompts, *among)]
    sets = [captioned(source, range(len(source)), pipe) for source in sources]
    (images, captions), n = (sum(parts, []) for parts in zip(*sets)), len(sets[0][0])
    known = image_latents(pipe, torch.stack(images))
    sampled = torch.cat([images for _, images in pipe(captions[:n], replace(cfg, n=1))])
    sampled = shrink(sampled, pipe.vq.cfg.upscale)
    nearest = torch.cdist(image_latents(pipe, sampled), known).argmin(1).tolist()

    def concept(text):
        return re.sub(ignore, "", text) if ignore else text

    own = sum(i == k for k, i in enumerate(nearest)) / n
    same = sum(concept(captions[i]) == concept(captions[k]) for k, i in enumerate(nearest)) / n
    pairs = [(captions[k], captions[i]) for k, i in enumerate(nearest)]
    return {"own": own, "concept": same, "n": n, "images": len(images)}, pairs


# --- the commands ----------------------------------------------------------------------------------------


def scenes_command(args, pipe, sampling):
    """`evaluate scenes`: print and return the results."""
    figures = scene_accuracy(pipe, sampling, args.prompts_per_category)
    for row, scores in figures.items():
        print(f"{row:10}" + "".join(f" {name} {value:.1%} " for name, value in scores.items()))
    seconds = seconds_per_image(pipe, scene_prompts("counting", False, 1)[0][0], sampling)
    print(f"{seconds:.3f} s for an image alone")
    return {"figures": figures, "seconds_per_image": seconds}


def recall_command(args, pipe, sampling):
    """`evaluate recall`: print and return the results."""
    figures, pairs = recall(pipe, sampling, args.prompts, filter(None, args.among.split(",")), args.ignore)
    for prompt, found in pairs:
        print(f"{prompt}  ->  {found}")
    own, concept = (f"{figures[k]:.1%}" for k in ("own", "concept"))
    print(f"own image {own}, right concept {concept} of {figures['n']} captions, among {figures['images']} images")
    return {"figures": figures}


def rerank_command(args, pipe, sampling):
    """`evaluate rerank`: print and return the results."""
    judges = {folder: Pipeline(folder, pipe.device) for folder in filter(None, args.judges.split(","))}
    if pipe.model.cfg.model == "gpt":  # a masked model gives no likelihood of the codes
        judges = {"likelihood": None} | judges
    figures = reranking(pipe, sampling, judges, args.prompts_per_category)
    for name, row in figures.items():
        print(f"{name:12}" + "".join(f" best of {k}: {accuracy:.1%} " for k, accuracy in row.items()))
    return {"figures": figures}


def captions_command(args, pipe, sampling):
    """`evaluate captions`: print and return the results."""
    rows = scene_captions(pipe, sampling, args.prompts_per_category)
    for category, true, text in rows:
        print(f"{category:18} {'true ' if true else 'false'} {text}")
    figures = score_scenes((category, true) for category, true, _ in rows)
    print("true: " + ", ".join(f"{name} {value:.1%}" for name, value in figures.items()))
    return {"figures": figures}


def enlarge_command(args, pipe, sampling):
    """`evaluate enlarge`: print and return the results, save the grid."""
    source = open_source(args.images, pick(DataConfig, pipe.config["data"]))
    figures, grid = enlarging(pipe, sampling, source, args.n_images)
    for way, row in figures.items():
        print(f"{way:10} {row['psnr']:.2f} dB, sharpness {row['sharpness']:.2f}" if way != "n" else f"{row} images")
    if args.show:
        save_image(args.show, grid)
    return {"figures": figures}


def tokenizer_command(args):
    """`evaluate tokenizer`: print and return the results."""
    vq = load_vq(args.model, pick_device(args.device))
    size = parse_size(args.image_size or read_config(args.model)["data"]["image_size"])  # of what it encodes
    args.image_size = "x".join(str(n * vq.cfg.upscale) for n in size)
    crops = image_set(args.images, args.image_size, args.n_images, args.workers)
    figures, counts = quality(vq, (images for _, images in batches(crops)), args.tile)
    if args.features:
        extract = pick_features(args.features, pick_device(args.device))

        def roundtrip(images):
            codes = vq.encode(shrink(images.to(extract.device), vq.cfg.upscale), args.tile)
            return vq.decode(codes, args.tile)

        rows = [features(extract, crops, args.cache), features(extract, crops, args.cache, roundtrip, vq.hash)]
        figures |= {"rFID": frechet(*moments(rows[0]), *moments(rows[1])), "features": extract.name}
    if args.show:
        text = (
            f"rows: input, reconstruction, error x2, codes (similar codes, similar colours)\n"
            f"{figures['n']} images, PSNR {figures['psnr']:.2f} dB\n"
            f"{figures['code_use']:.1%} of {vq.cfg.n_codes} codes used, perplexity {figures['perplexity']:.0f}"
        )
        images = torch.cat([part for _, (_, part) in zip(range(8), batches(crops, 1))])
        save_image(args.show, tokenizer_grid(vq, images, counts, text, args.tile), model=args.model, text=text)
    print_figures(figures)
    return {"figures": figures, "model": vq.hash} | ({"features_hash": extract.hash} if args.features else {})


def fid_command(args):
    """`evaluate fid`: print and return the results."""
    extract = pick_features(args.features, pick_device(args.device))
    source = open_source(args.fake, DataConfig(image_size=args.image_size or "64"))
    args.image_size = args.image_size or first_size(source)
    real, fake = (image_set(s, args.image_size, args.n_images, args.workers) for s in (args.real, args.fake))
    figures = fid(extract, real, fake, args.cache, [int(k) for k in args.radii.split(",")])
    print_figures(figures)
    if min(figures["n_real"], figures["n_fake"]) <= extract.width:
        print(f"note: FID is too high when there are no more images than the {extract.width} features")
    return {"figures": figures, "sampled_by": sampled_by(source), "features_hash": extract.hash}


def print_figures(figures):
    """Print {name: value}, a line each."""
    for name, value in figures.items():
        print(f"{name:12} {value:.4g}" if isinstance(value, float) else f"{name:12} {value}")


def first_size(source):
    """HEIGHTxWIDTH of a source's first readable image."""
    for i in range(len(source)):
        with contextlib.suppress(BadEntry):
            return "{1}x{0}".format(*source.image(i).size)
    raise ValueError(f"none of the {len(source)} images can be read, {source.key(0)} for one")


def sampled_by(source):
    """Model hash and settings that sample.py wrote into the first image of a folder; {} if there are none."""
    try:
        with Image.open(source.paths[0]) as im:
            return {k: im.info[k] for k in ("model", "settings") if k in im.info}
    except (AttributeError, OSError):  # shards, scenes
        return {}


REQUIRED = None  # in place of a default
PER_CATEGORY = "prompts per category"
IMAGES = {
    "image_size": ("", "crop to 64 or HEIGHTxWIDTH; empty: the tokenizer's, or the first fake's"),
    "n_images": (0, "use the first n images; 0: all"),
    "cache": ("out/cache", "folder of cached features"),
    "workers": (2, "loader processes"),
}
COMMON = {
    "device": ("auto", "auto, cpu, cuda, mps"),
    "out": ("", "write figures, settings and hashes to this JSON file"),
}
FLAGS = {  # command -> flag -> (default, help)
    "scenes": {"prompts_per_category": (500, PER_CATEGORY)},
    "recall": {
        "prompts": (REQUIRED, "folder of captioned images"),
        "among": ("", "further folders whose images compete, joined by commas"),
        "ignore": (TONE, "regular expression: the part of a caption that is not its concept"),
    },
    "rerank": {
        "prompts_per_category": (50, PER_CATEGORY),
        "judges": ("", "folders of captioners (CapLoss) or towers, joined by commas"),
    },
    "captions": {"prompts_per_category": (20, PER_CATEGORY)},
    "enlarge": {
        "images": (REQUIRED, "captioned images: a folder, tar shards, or 'scenes'"),
        "n_images": (32, "use the first n"),
        "show": ("", "write the first 8 to this PNG: bicubic, sampled, tokenizer, original"),
    },
    "tokenizer": {
        "model": (REQUIRED, "folder of a tokenizer"),
        "images": (REQUIRED, "a folder, tar shards, or 'scenes'"),
        "features": ("", "for rFID: 'inception', a file of its weights, or a folder (a tokenizer, towers)"),
        "show": ("", "write a grid to this PNG: input, reconstruction, error, codes, and codebook usage"),
        "tile": (0, "side in codes of tiles that are processed one at a time, for large images; 0: whole"),
    }
    | IMAGES,
    "fid": {
        "real": (REQUIRED, "a folder, tar shards, or 'scenes'"),
        "fake": (REQUIRED, "images to judge, a folder that sample.py wrote"),
        "features": ("inception", "'inception', a file of its weights, or a folder (a tokenizer, towers)"),
        "radii": ("0,1,2,4,8", "blur radii in pixels, joined by commas"),
    }
    | IMAGES,
}
PRIOR_COMMANDS = {
    "scenes": (scenes_command, "a prior's accuracy on generated scenes, by category"),
    "recall": (recall_command, "how often the image sampled for a caption is nearest to the caption's own image"),
    "rerank": (rerank_command, "what choosing the best of --n images of a held-out scene gains, by score"),
    "captions": (captions_command, "how often what a captioner says of a scene is true"),
    "enlarge": (enlarge_command, "PSNR and sharpness of a prior with --condition coarse, beside bicubic interpolation"),
}
IMAGE_COMMANDS = {
    "tokenizer": (tokenizer_command, "PSNR, SSIM, sharpness, codebook usage and rFID of a tokenizer"),
    "fid": (fid_command, "FID between two sets of images for several blur radii, and IS of the second"),
}
SAMPLING = merge(SampleConfig, *(model.Sampling for model in MODELS.values()))


def measure_prior(args):
    """Run one of PRIOR_COMMANDS -> the record to write."""
    given = {f.name: getattr(args, f.name) for f in fields(SAMPLING) if hasattr(args, f.name)}
    if args.command != "rerank":
        if given.get("n", 1) != 1:
            raise ValueError(f"--n {given['n']} is a setting of rerank; {args.command} samples one image per prompt")
        given["n"] = 1
    pipe = Pipeline(args.model, pick_device(args.device))
    if (args.command == "captions") != isinstance(pipe.model, Captioner):
        raise ValueError(f"{args.model}: `captions` needs a prior of --model captioner, all other commands another")
    if unknown := [name for name in given if not hasattr(pipe.sampling, name)]:
        raise ValueError(f"--{unknown[0]} is not a sampling setting of --model {pipe.model.cfg.model}; leave it out")
    sampling = replace(pipe.sampling, **given)
    record = PRIOR_COMMANDS[args.command][0](args, pipe, sampling)
    return record | {"sampling": asdict(sampling), "model": pipe.hash}


def make_parser():
    """The parser of all commands and their flags."""
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, text) in (PRIOR_COMMANDS | IMAGE_COMMANDS).items():
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        model = {"model": ("scenes", "folder of a prior, or a model that ships")} if name in PRIOR_COMMANDS else {}
        for flag, (default, about) in (model | FLAGS[name] | COMMON).items():
            kind = str if not isinstance(default, int) else count if default and flag != "workers" else int
            about = about if default is REQUIRED else f"{about} [{default}]"
            command.add_argument(f"--{flag}", type=kind, default=default, required=default is REQUIRED, help=about)
        if name in PRIOR_COMMANDS:
            command.argument_default = argparse.SUPPRESS  # what is not given comes from the model's folder
            add_flags(command, SAMPLING)
    return parser


def main():
    args = make_parser().parse_args()
    if args.out:
        check_writable(args.out)
    record = measure_prior(args) if args.command in PRIOR_COMMANDS else IMAGE_COMMANDS[args.command][0](args)
    if args.out:
        record |= {"settings": vars(args), "command": " ".join(sys.argv)}
        write_file(args.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
