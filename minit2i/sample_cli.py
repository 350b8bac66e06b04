"""Sample images for prompts, or captions for an image.

python sample.py --prompt "a large red circle above a small blue square"
python sample.py --model out/prior --prompt "woman pilot" --n 16 --cfg_scale 3 --every 8
python sample.py --model out/prior --prompts prompts.txt --out out/images
python sample.py --prompt "three green triangles" --image scene.png
python sample.py --model out/masked --prompt "a blue star" --image scene.png --inpaint_mask hole.png
python sample.py --model out/prior --prompt "a red dress" --image_size 64x128
python sample.py --model out/prior --prompt "a red dress" --enlarge out/larger --enlarge out/larger
python sample.py --model out/prior --prompt "a red dress" --best_of 16 --judge out/captioner
python sample.py --model out/captioner --image photo.png

Of --image the upper half is kept; with --image_size all of it, in the middle; with --inpaint_mask what the mask leaves
black (a mask with transparency: what it leaves transparent); with --enlarge alone all of it, enlarged.  A prior with a
spatial condition takes that from --image: its edges, or a low resolution of it.
"""

import argparse
import io
import json
import re
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

from minit2i.checkpoint import check_writable, file_hash, read_config, write_file
from minit2i.config import pick
from minit2i.data import crop, parse_size
from minit2i.flags import add_flags, count, new_parser
from minit2i.plot import grid_image, save_image, to_pil
from minit2i.sample import SHIPPED, NotFinite, Pipeline, SampleConfig, as_codes_of, check_prior, find_model, same_codes
from minit2i.sample import sample_settings, score_codes
from minit2i.sources import EXTENSIONS, BadEntry, open_rgb, read_text_file, text_lines
from minit2i.train import out_of_memory, pick_device, run

# --- flags ---------------------------------------------------------------------------------------------


def make_parser(settings, saved, add_help=True):
    """The parser of all flags: settings is a SampleConfig class, saved its values in the model's config.json."""
    parser = new_parser(__doc__, add_help=add_help)
    add, names = parser.add_argument, ", ".join(sorted(path.name for path in SHIPPED.iterdir() if path.is_dir()))
    add("--model", default="scenes", help=f"a prior's checkpoint folder, or a model that ships: {names} [scenes]")
    add("--prompt", help="caption of the images; '' for none")
    add("--prompts", help="text file, one prompt per line; images that are there already are not sampled again")
    add("--out", default="sample.png", help="NAME.png for a grid, or a folder for single PNGs [sample.png]")
    add("--image", help="image to complete, to enlarge, to take a condition from, or (--model a captioner) to caption")
    add("--inpaint_mask", help="image that is white where --image is painted anew")
    add("--image_size", help="pixels, N or HEIGHTxWIDTH: larger than the model's images, in a sliding window")
    add("--enlarge", action="append", default=[], help="super-resolution prior; repeat it to enlarge again")
    add("--best_of", type=count, help="images sampled per prompt, of which the best --n are kept")
    add("--judge", help="captioner or towers that score for --best_of [none: likelihood, which prefers what was seen]")
    add("--every", type=count, help="also an animated PNG of the growing images, a frame every so many codes")
    add("--vq", default="", help="decode with this tokenizer: a finetuned or an enlarging decoder of the same codes")
    add("--batch", type=count, default=64, help="images sampled at a time [64]")
    add("--device", default="auto", help="auto, cpu, cuda, mps [auto]")
    add("--compile", action="store_true", help="torch.compile the loop over codes: pays for many images")
    parser.argument_default = argparse.SUPPRESS  # only the settings that are given appear in the result
    add_flags(parser, settings, values=saved)
    return parser


def parse(argv=None):
    """argv -> (flags, SampleConfig): `class defaults | config.json's "sampling" | given`.  ValueError for conflicts."""
    first, _ = make_parser(SampleConfig, {}, add_help=False).parse_known_args(argv)
    named = [("--model", first.model), *(("--enlarge", folder) for folder in first.enlarge)]
    named += [("--judge", first.judge)] if first.judge else []
    configs = []
    for flag, folder in named:
        try:
            configs.append(read_config(find_model(folder)))
        except ValueError as e:
            raise ValueError(f"{flag} {e}") from None
        check_prior(configs[-1], flag, folder)
    sampling = configs[: 1 + len(first.enlarge)]
    settings, saved = sample_settings(*sampling), configs[0].get("sampling", {})
    args = make_parser(settings, saved).parse_args(argv)
    cfg = pick(settings, saved | vars(args))
    if args.prompt is None and args.prompts is None and args.image:  # a captioner's work
        for name in ("image_size", "inpaint_mask", "enlarge", "best_of", "every"):
            if getattr(args, name):
                raise ValueError(f"--{name} needs a prompt; give one of --prompt and --prompts")
    elif (args.prompt is None) == (args.prompts is None):
        raise ValueError("give one of --prompt and --prompts (or, with a captioner as --model, --image alone)")
    if args.inpaint_mask and not args.image:
        raise ValueError("--inpaint_mask needs --image, the image to paint in")
    if args.best_of and args.best_of < cfg.n:
        raise ValueError(f"--best_of {args.best_of} is less than --n {cfg.n}, the images kept; use more")
    if args.judge and not args.best_of:
        raise ValueError("--judge needs --best_of, how many images to choose from")
    if args.every and (args.best_of or cfg.n > args.batch):
        raise ValueError("--every shows all --n images of one --batch; use a larger --batch, and no --best_of")
    return args, cfg


# --- prompts and images to read -------------------------------------------------------------------------


def read_prompts(path):
    """The nonempty lines of a text file; ValueError if there are none."""
    if prompts := text_lines(read_text_file(path)):
        return prompts
    raise ValueError(f"--prompts {path} has no prompts; write one per line")


def open_image(flag, path):
    """The image that a flag names -> PIL RGB image; ValueError if it cannot be used."""
    try:
        return open_rgb(path)
    except BadEntry as e:
        raise ValueError(f"{flag} {path}: {e}") from None


def open_mask(path, image):
    """An inpainting mask for a PIL image -> PIL RGB image, white where to paint.

    A pixel is painted if its alpha (if that varies) or else its gray exceeds the middle of the mask's range.  In a copy
    of the image that was erased in parts it is the other way round: the transparent pixels are painted (as DALL-E 2's
    edits are given).  ValueError for another aspect ratio than the image's.
    """
    open_image("--inpaint_mask", path)  # raises if it is not an image
    with Image.open(path) as im:
        im = ImageOps.exif_transpose(im)
        values = np.asarray(im if im.mode[0] in "IF" else im.convert("L"), float)  # "L" would clip 16 bits
        alpha = np.asarray(im.convert("RGBA"), float)[..., 3] if im.has_transparency_data else values
        colors = np.asarray(im.convert("RGB").resize(image.size), float)
    if np.ptp(alpha):
        values = -alpha if is_erased(colors, alpha, image) else alpha  # (H, W)
    h, w = values.shape
    if abs(w * image.height - h * image.width) > max(h, w, image.height, image.width):  # a pixel of rounding passes
        raise ValueError(
            f"--inpaint_mask {path} is {h}x{w}, another aspect ratio than --image, {image.height}x{image.width}; "
            "paint the mask on a copy of the image"
        )
    white = values > (values.min() + values.max()) / 2
    return Image.fromarray(white.astype(np.uint8) * 255).convert("RGB")


def is_erased(colors, alpha, image):
    """Whether the opaque pixels of a mask (colors (H, W, 3) at the image's size) show the image, not one colour."""
    opaque = np.asarray(Image.fromarray(alpha.astype(np.uint8)).resize(image.size)) == 255
    shown, there = colors[opaque], np.asarray(image, float)[opaque]
    return (
        len(shown) and np.ptp(shown, 0).any() and abs(shown - there).mean() < 8
    )  # measured: a JPEG's copy differs by 2


def known_codes(pipeline, args):
    """--image, --inpaint_mask and --image_size -> given codes (1, h, w), -1 where to sample; None: sample all."""
    size = parse_size(args.image_size) if args.image_size else pipeline.size
    h, w = pipeline.vq.grid(*size)
    if size[0] < pipeline.size[0] or size[1] < pipeline.size[1]:
        own = "x".join(map(str, pipeline.size))
        raise ValueError(f"--image_size {args.image_size} is smaller than the images of this prior, {own}; use more")
    known = torch.full((1, h, w), -1, device=pipeline.device)
    if not args.image or is_spatial(pipeline):
        return known if args.image_size else None
    image = open_image("--image", args.image)
    inside = size if args.inpaint_mask else pipeline.size
    codes = pipeline.vq.encode(crop(image, inside)[None].to(pipeline.device))
    if args.inpaint_mask:
        mask = crop(open_mask(args.inpaint_mask, image), size).mean(0)[None, None].to(pipeline.device)  # (1, 1, H, W)
        paint = F.adaptive_max_pool2d(mask, (h, w))[0] > 0  # (1, h, w): the codes it touches
        if paint.all() or not paint.any():
            raise ValueError(
                f"--inpaint_mask {args.inpaint_mask} marks {int(paint.sum())} of {h * w} codes; paint white on black "
                "(or opaque on transparent) where to sample"
            )
        return codes.masked_fill(paint, -1)
    if args.image_size:
        top, left = (h - codes.shape[1]) // 2, (w - codes.shape[2]) // 2
        known[:, top : top + codes.shape[1], left : left + codes.shape[2]] = codes
        return known
    if not args.enlarge:
        codes[:, h // 2 :] = -1
    return codes


def is_spatial(pipeline):
    """Whether the prior is conditioned on another view of the image, of the same size (papers/taming.py)."""
    return pipeline.view is not None and pipeline.view.ratio == 1


def spatial_codes(pipeline, args):
    """--image -> codes (1, h, w) of the view of it that a spatial prior is conditioned on; None for other priors."""
    if not is_spatial(pipeline) or not args.image:
        return None
    if args.inpaint_mask:
        raise ValueError("--inpaint_mask paints in --image, which this prior is conditioned on; leave it out")
    image = crop(open_image("--image", args.image), parse_size(args.image_size) if args.image_size else pipeline.size)
    return pipeline.view_vq.encode(pipeline.view.f(image[None].to(pipeline.device)))


# --- from prompts to images -----------------------------------------------------------------------------


def load(args):
    """-> the prior, those of --enlarge in order, the judge or None; ValueError for an --enlarge that cannot."""
    device, folders = pick_device(args.device), [args.model, *args.enlarge]
    decoders = {folders[-1]: args.vq}  # --vq decodes the final images
    loaded = {f: Pipeline(f, device, vq=decoders.get(f, ""), compile=args.compile) for f in dict.fromkeys(folders)}
    for folder, smaller in zip(args.enlarge, folders):
        larger = loaded[folder]
        if not larger.view or is_spatial(larger):
            raise ValueError(f"--enlarge {folder} does not enlarge images; train one with --condition text,coarse")
        if larger.view.vq and not same_codes(larger.view_vq, loaded[smaller].vq):
            raise ValueError(
                f"--enlarge {folder} has learned the codes of another tokenizer than {smaller} samples; use a prior "
                f"trained with --vq {folder}/{larger.view.key}_vq, or train the larger one with "
                f"--{larger.view.key}_vq {smaller}/vq"
            )
    return loaded[args.model], [loaded[f] for f in args.enlarge], Pipeline(args.judge, device) if args.judge else None


class Growth:
    """Called with codes (B, h, w) during sampling: moves the progress bar, keeps a frame every `every` codes."""

    def __init__(self, bar, every):
        self.bar, self.every, self.start = bar, every, bar.n
        self.shown, self.last, self.frames = time.monotonic(), 0, []

    def __call__(self, codes):
        if self.every or time.monotonic() - self.shown > 0.2:  # not at each code: counting them waits for the GPU
            done = int((codes >= 0).sum())
            self.shown, self.bar.n = time.monotonic(), self.start + len(codes) * done / codes.numel()
            self.bar.refresh()
            if self.every and (not self.frames or done - self.last >= self.every * len(codes) or done == codes.numel()):
                self.last = done
                self.frames.append(codes.cpu().clone())


def finish(prompt, codes, pipeline, larger, judge, cfg, args):
    """Sampled codes of a prompt -> images (n, 3, H, W), the best ones, enlarged; and their scores or None."""
    scores = None
    if args.best_of:
        loss, best = score_codes(pipeline, judge, prompt, codes, args.batch).sort()
        codes, scores = codes[best[: cfg.n]], loss[: cfg.n].tolist()
    for p in larger:
        parts = []
        for i, part in enumerate(codes.split(args.batch)):
            own = replace(cfg, n=len(part), seed=cfg.seed + i * args.batch)
            parts.append(p.sample_codes([prompt], own, coarse=as_codes_of(p.view_vq, pipeline, part)))
        pipeline, codes = p, torch.cat(parts)
    return torch.cat([pipeline.decode(part) for part in codes.split(args.batch)]), scores


# --- files ----------------------------------------------------------------------------------------------


def is_sampled(path):
    """Whether a file is a PNG of this script."""
    try:
        with Image.open(path) as im:
            return "settings" in im.info
    except (OSError, SyntaxError, ValueError):
        return False


class Output:
    """PNG files that say how they were made: one grid of all images, or a folder with a file for each.

    Text chunks: prompt, model (hashes of the weights), settings (JSON), and the score of images chosen by --best_of.
    """

    def __init__(self, args, cfg, model, n_prompts):
        self.path, self.cfg, self.model, self.best_of, self.kept = Path(args.out), cfg, model, args.best_of, {}
        flags = ("image", "inpaint_mask", "image_size", "enlarge", "best_of", "every")
        used = {k: getattr(args, k) for k in flags if getattr(args, k)}
        hashes = {f"{k}_hash": file_hash(v) for k, v in used.items() if k in ("image", "inpaint_mask")}
        self.settings, self.single = asdict(cfg) | used | hashes, self.path.suffix.lower() == ".png"
        if self.path.suffix.lower() in EXTENSIONS and not self.single:
            raise ValueError(f"--out {args.out}: images are written as PNG; use NAME.png, or a folder")
        if self.single and self.path.is_file() and not is_sampled(self.path):
            raise ValueError(f"--out {args.out} is an image that was not sampled here; use another name")
        if self.single and (n_prompts * cfg.n > 1024 or n_prompts > 1 and args.every):
            raise ValueError(f"the images of {n_prompts} prompts do not fit in one PNG; name a folder with --out")
        check_writable(self.path if self.single else self.path / "00000.png")

    def file(self, k, prompt, end):
        name = re.sub(r"[^\w]+", "-", prompt)[:40].strip("-") or "image"  # 40 letters are at most 160 bytes
        return self.path / f"{k:05d}-{name}-{end}.png"

    def chunks(self, k, prompt, i):
        """Text chunks of image i of prompt k; its seed, or with --best_of the first of those it was chosen from."""
        seed = self.cfg.seed + (k * self.best_of if self.best_of else k * self.cfg.n + i)
        return dict(prompt=prompt, model=self.model, settings=json.dumps(self.settings | {"seed": seed}))

    def has(self, k, prompt):
        """Whether all images of a prompt are there, made by the same models with the same settings."""
        try:
            for i in range(self.cfg.n):
                with Image.open(self.file(k, prompt, i)) as im:
                    if not self.chunks(k, prompt, i).items() <= im.info.items():
                        return False
            return True
        except (OSError, SyntaxError, ValueError):  # missing or damaged
            return False

    def add(self, k, prompt, images, scores, frames):
        """images (n, 3, H, W); scores: floats or None; frames: PIL images of the animation, or []."""
        if frames:
            data, durations = io.BytesIO(), [80] * (len(frames) - 1) + [2000]
            frames[0].save(data, "PNG", save_all=True, append_images=frames[1:], duration=durations, loop=0)
            growing = self.path.with_name(f"{self.path.stem}-growing.png")
            write_file(growing if self.single else self.file(k, prompt, "growing"), data.getvalue())
        if self.single:
            self.kept[k] = prompt, images.cpu(), scores
            return
        for i, image in enumerate(images):
            score = {"score": f"{scores[i]:.5f}"} if scores else {}
            save_image(self.file(k, prompt, i), to_pil(image), **self.chunks(k, prompt, i), **score)

    def close(self):
        """Write the grid, if --out names one."""
        if self.kept:
            prompts, images, scores = zip(*(self.kept[k] for k in sorted(self.kept)))
            columns = self.cfg.n if len(images) > 1 else min(self.cfg.n, max(4, round(self.cfg.n**0.5)))
            chunks = dict(prompt="\n".join(prompts), model=self.model, settings=json.dumps(self.settings))
            chunks |= {"score": json.dumps(scores)} if scores[0] else {}
            save_image(self.path, grid_image(torch.cat(images), columns), **chunks)


def make_all(groups, make, batch):
    """make(group) for each group of [(k, prompt)] -> [(prompt, why)] of those that fail.

    One prompt whose logits are NaN, or too little memory for a group, does not lose the others: the group is halved.
    """
    failed = []
    while groups:
        group, *groups = groups
        try:
            make(group)
        except (NotFinite, MemoryError, RuntimeError) as e:
            if not (isinstance(e, NotFinite) or out_of_memory(e)):
                raise
            if len(group) > 1:
                groups = [group[: len(group) // 2], group[len(group) // 2 :], *groups]
                continue
            memory = f"not enough memory for --batch {batch}; use a smaller one ({e})"
            failed.append((group[0][1], str(e) if isinstance(e, NotFinite) else memory))
    return failed


def main(argv=None):
    args, cfg = parse(argv)
    pipeline, larger, judge = load(args)
    if args.prompt is None and args.prompts is None:
        image = crop(open_image("--image", args.image), pipeline.size)
        return print("\n".join(pipeline.captions(image[None], cfg)[0]))
    known, condition = known_codes(pipeline, args), spatial_codes(pipeline, args)
    if args.best_of:  # a judge that cannot score these images says so before they are sampled
        grid = pipeline.grid if known is None else known.shape[1:]
        score_codes(pipeline, judge, "", torch.zeros(1, *grid, dtype=torch.long, device=pipeline.device))
    prompts = [args.prompt] if args.prompts is None else read_prompts(args.prompts)
    hashes = [p.hash for p in (pipeline, *larger, judge) if p]
    hashes += [(larger or [pipeline])[-1].vq.hash] if args.vq else []
    out = Output(args, cfg, "+".join(hashes), len(prompts))
    todo = [(k, prompt) for k, prompt in enumerate(prompts) if out.single or not out.has(k, prompt)]
    sampled = replace(cfg, n=args.best_of or cfg.n)
    size = 1 if args.every else max(1, args.batch // sampled.n)
    style = "{l_bar}{bar}| {n:.1f}/{total_fmt} images [{elapsed}<{remaining}]"
    with tqdm(total=len(todo) * sampled.n, bar_format=style) as bar:

        def make(some):
            growth = Growth(bar, args.every)
            found = pipeline.sample_prompts(some, sampled, known, args.batch, growth, condition)
            for (k, prompt), codes in zip(some, found):
                own = replace(cfg, seed=cfg.seed + k * sampled.n)
                images, scores = finish(prompt, codes, pipeline, larger, judge, own, args)
                grids = [grid_image(pipeline.decode(f.to(pipeline.device)), len(f)) for f in growth.frames]
                out.add(k, prompt, images, scores, grids)
            bar.n = growth.start + len(some) * sampled.n
            bar.refresh()

        failed = make_all([todo[first : first + size] for first in range(0, len(todo), size)], make, args.batch)
    out.close()
    if failed:
        why = failed[0][1] if len(prompts) == 1 else "; ".join(f"{prompt!r}: {why}" for prompt, why in failed[:3])
        rest = f"{len(failed)} of {len(prompts)} prompts failed, the others are in {out.path}: "
        raise ValueError((rest if len(prompts) > 1 else "") + why)
    cut = f"; {pipeline.text.n_cut} prompts were too long and were cut" if pipeline.text.n_cut else ""
    print(f"{out.path}: {cfg.n} x {len(prompts)} images{cut}")


if __name__ == "__main__":
    run(main)
