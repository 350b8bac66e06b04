"""Draw pictures for prompts, or write captions for pictures.

python sample.py --prompt "a large red circle above a small blue square"
python sample.py --model out/prior --prompt "woman pilot" --n 16 --cfg_scale 3 --every 8
python sample.py --model out/prior --prompts prompts.txt --out out/pictures
python sample.py --prompt "three green triangles" --image scene.png --keep_rows 4
python sample.py --model out/masked --prompt "a blue star" --image scene.png --mask hole.png
python sample.py --model out/prior --prompt "a red dress" --size 64x128
python sample.py --model out/prior --prompt "a red dress" --enlarge out/sr --times 2
python sample.py --model out/prior --prompt "a red dress" --best_of 16 --captioner out/captioner
python sample.py --prompt "a red circle" --best_of 16 --rerank contrastive --towers out/towers
python sample.py --model out/captioner --caption picture.png
"""

import argparse
import io
import json
import re
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
from PIL import Image

from minit2i.backbones import shrink
from minit2i.checkpoint import write_file
from minit2i.data import EXTENSIONS, BadEntry, crop, grid_image, open_rgb, parse_size, to_pil
from minit2i.flags import add_flags, new_parser, pick
from minit2i.sample import PRETRAINED, Bar, Painter, SampleConfig, code_losses, file_hash
from minit2i.train import pick_device, run, save_image


def flags():
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--model", default=str(PRETRAINED), help="checkpoint folder of a prior [the one that ships]")
    add("--vq", default="", help="decode with this tokenizer: a finetuned or enlarging one of the same codes")
    add("--prompt", help="what to draw; '' draws without a caption")
    add("--prompts", help="a text file with one prompt a line; pictures that are there already are not drawn again")
    add("--caption", help="a picture to write --n captions for, with a prior of --order image")
    add("--out", default="sample.png", help="NAME.png for a grid, or a folder for single PNGs [sample.png]")
    add("--size", help="pixels, N or HxW: larger than the model's pictures, drawn in a window that moves")
    add("--image", help="a picture to finish; with --size and no --mask it is put in the middle, to draw around it")
    add("--keep_rows", type=int, help="rows of codes kept of --image [half of them, without --mask or --size]")
    add("--mask", help="a picture that is white where --image is drawn anew")
    add("--enlarge", help="a prior of --low that enlarges what was drawn, or --image")
    add("--times", type=int, default=1, help="how often --enlarge enlarges [1]")
    add("--best_of", type=int, default=0, help="pictures drawn of each prompt, of which the best --n are kept")
    scores = "contrastive", "caploss", "likelihood"
    add("--rerank", default="caploss", choices=scores, help="the score of --best_of [caploss]")
    add("--captioner", help="the prior of --order image that tells the loss of the caption")
    add("--towers", help="the model of --objective contrast that --rerank contrastive scores with")
    add("--every", type=int, default=0, help="an animated PNG of the growing pictures, a frame every so many codes")
    add("--batch", type=int, default=64, help="pictures drawn at a time [64]")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--half", action=argparse.BooleanOptionalAction, default=False, help="bfloat16 weights")
    add(
        "--compile",
        action="store_true",
        help="torch.compile the loop over codes: pays for many pictures of causal priors",
    )
    add_flags(parser, SampleConfig)
    args = parser.parse_args()
    check(args)
    return args


def check(args):
    """ValueError for flags that do not go together."""
    if sum(x is not None for x in (args.prompt, args.prompts, args.caption)) != 1:
        raise ValueError("give one of --prompt, --prompts, --caption")
    for name in ("keep_rows", "mask"):
        if getattr(args, name) is not None and not args.image:
            raise ValueError(f"--{name} needs --image, the picture to finish")
    if args.keep_rows is not None and (args.mask or args.size):
        raise ValueError("--keep_rows is for pictures without --mask and --size")
    if args.best_of and args.best_of < args.n:
        raise ValueError(f"--best_of {args.best_of} is less than --n {args.n}, the pictures kept")
    if args.best_of and args.rerank == "caploss" and not args.captioner:
        raise ValueError("--best_of needs --captioner, a prior of --order image, or --rerank likelihood")
    if (args.best_of and args.rerank == "contrastive") != bool(args.towers):
        raise ValueError(
            "--towers, a model of --objective contrast, and --best_of with --rerank contrastive go together"
        )
    if args.rerank != "caploss" and not args.best_of:
        raise ValueError(f"--rerank {args.rerank} needs --best_of, how many pictures to choose from")
    if args.captioner and (not args.best_of or args.rerank != "caploss"):
        raise ValueError("--captioner needs --best_of, how many pictures to choose from, and --rerank caploss")
    if args.caption is not None:
        for name in ("image", "size", "enlarge", "best_of", "every", "compile"):
            if getattr(args, name):
                raise ValueError(f"--caption writes words: it has no use for --{name}")
    if args.times > 1 and not args.enlarge:
        raise ValueError(f"--times {args.times} needs --enlarge, the prior that enlarges")
    if args.batch < 1 or args.times < 1 or args.every < 0:
        raise ValueError(f"--batch {args.batch}, --times {args.times}: use 1 or more; --every {args.every}: 0 or more")
    if args.every and (args.best_of or args.n > args.batch):
        raise ValueError("--every shows all --n pictures in one --batch, without --best_of")


# --- prompts and pictures in ---------------------------------------------------------------------------


def read_prompts(path):
    """The lines of a file, one at a time, without empty ones, with their numbers."""
    if Path(path).is_fifo():
        raise ValueError(f"--prompts {path} is a pipe, and it is read twice: write the prompts to a file")
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        yield from enumerate(line for line in map(str.strip, f) if line)


def read_picture(flag, path, size):
    try:
        return crop(open_rgb(path), size)
    except BadEntry as e:
        raise ValueError(f"{flag} {path}: {e}") from None


def known_codes(painter, args):
    """What --image, --keep_rows, --mask and --size give -> codes (1, h, w), -1 where to draw; None: all."""
    size = parse_size(args.size) if args.size else painter.size
    h, w = painter.vq.grid(*size)
    if any(n < own for n, own in zip(size, painter.size)):
        raise ValueError(
            f"--size {args.size} is smaller than the pictures of this prior, {'x'.join(map(str, painter.size))}"
        )
    if not args.image:
        return torch.full((1, h, w), -1, device=painter.device) if args.size else None
    inside = painter.size if args.size and not args.mask else size
    codes = painter.vq.encode(read_picture("--image", args.image, inside)[None].to(painter.device))
    if args.mask:
        mask = read_picture("--mask", args.mask, size).mean(0)[None, None].to(painter.device)  # (1, 1, H, W)
        return codes.masked_fill(torch.nn.functional.adaptive_max_pool2d(mask, (h, w))[0] > 0, -1)
    if args.size:
        known = torch.full((1, h, w), -1, device=painter.device)
        top, left = (h - codes.shape[1]) // 2, (w - codes.shape[2]) // 2
        known[:, top : top + codes.shape[1], left : left + codes.shape[2]] = codes
        return known
    if args.enlarge and args.keep_rows is None:  # enlarged as it is
        return codes
    rows = h // 2 if args.keep_rows is None else args.keep_rows
    if not 0 < rows <= h:
        raise ValueError(f"--keep_rows {rows} is not between 1 and the {h} rows of codes of this model")
    codes[:, rows:] = -1
    return codes


# --- enlarging ------------------------------------------------------------------------------


def enlarge(larger, painter, prompt, codes, cfg, args):
    """codes (n, h, w) that painter drew -> larger's codes, args.times times larger."""
    if larger.vq_hash != painter.vq_hash:
        images = (shrink(painter.images(part), painter.vq.cfg.upscale) for part in codes.split(args.batch))
        codes = torch.cat([larger.vq.encode(some) for some in images])
    for _ in range(args.times):
        parts = [
            larger.codes([prompt], replace(cfg, n=len(part), seed=cfg.seed + i * args.batch), low=part)
            for i, part in enumerate(codes.split(args.batch))
        ]
        codes = torch.cat(parts)
    return codes


# --- pictures out ----------------------------------------------------------------------------------------


class Frames:
    """The codes of prompts while they grow, every so many codes."""

    def __init__(self, every):
        self.every, self.frames = every, {}

    def __call__(self, prompts, codes):
        for (key, _), own in zip(prompts, codes):
            drawn = int((own >= 0).sum())
            kept = self.frames.setdefault(key, [])
            if kept and drawn < kept[-1][0]:  # this batch failed before, and is drawn again
                kept.clear()
            if not kept or (drawn - kept[-1][0]) >= self.every * len(own) or drawn == own.numel():
                kept.append((drawn, own.cpu().clone()))

    def animation(self, painter, number):
        """A prompt's pictures in a row -> bytes of an animated PNG, or None if all codes were given."""
        kept, out = self.frames.pop(number, ()), io.BytesIO()
        if not kept:
            return None
        sheets = [grid_image(painter.images(c.to(painter.device)), len(c)) for _, c in kept]
        durations = [80] * (len(sheets) - 1) + [2000]
        sheets[0].save(out, "PNG", save_all=True, append_images=sheets[1:], duration=durations, loop=0)
        return out.getvalue()


class Output:
    """Where pictures go: all into one PNG, or each into a PNG of its own in a folder."""

    def __init__(self, args, cfg, model, total):
        self.path, self.cfg, self.model = Path(args.out), cfg, model
        self.rerank, self.best_of, self.every = args.rerank, args.best_of, args.every
        flags_used = ("image", "keep_rows", "mask", "size", "enlarge", "times", "best_of", "half")
        self.settings = asdict(cfg) | {k: getattr(args, k) for k in flags_used if getattr(args, k)}
        self.settings |= {f"{k}_hash": file_hash(getattr(args, k)) for k in ("image", "mask") if getattr(args, k)}
        self.single, self.prompts, self.images, self.scores = self.path.suffix.lower() == ".png", [], [], []
        if self.path.suffix.lower() in EXTENSIONS and not self.single:
            raise ValueError(f"--out {args.out}: pictures are PNGs; use NAME.png, or a folder")
        if self.single and (total * cfg.n > 1024 or total > 1 and args.every):
            raise ValueError(f"the pictures of {total} prompts do not go into one PNG; name a folder with --out")

    def file(self, number, prompt, end):
        name = re.sub(r"[^\w]+", "-", prompt)[:60].encode()[:180].decode(errors="ignore")  # systems allow 255 bytes
        name = name.strip("-") or "picture"
        return self.path / f"{number:05d}-{name}-{end}.png"

    def chunks(self, number, prompt, i):
        """What a PNG says of itself; the seed is the picture's own, or of several the first that it was chosen from."""
        seed = self.cfg.seed + (number * self.best_of if self.best_of else number * self.cfg.n + i)
        return dict(prompt=prompt, model=self.model, settings=json.dumps(self.settings | {"seed": seed}))

    def has(self, number, prompt):
        """Whether all of a prompt's pictures are there, drawn by the same model with the same settings."""
        if self.single or self.every and not self.file(number, prompt, "growing").exists():
            return False
        with suppress(OSError, SyntaxError, ValueError):
            for i in range(self.cfg.n):
                with Image.open(self.file(number, prompt, i)) as im:
                    if any(im.info.get(k) != v for k, v in self.chunks(number, prompt, i).items()):
                        return False
            return True
        return False

    def add(self, number, prompt, images, scores, animation):
        """images (n, 3, H, W); scores: floats or None; animation: bytes or None."""
        if animation:
            growing = self.path.with_name(f"{self.path.stem}-growing.png")
            write_file(growing if self.single else self.file(number, prompt, "growing"), animation)
        if self.single:
            self.prompts.append(prompt), self.images.append(images.cpu()), self.scores.append(scores)
            return
        for i, image in enumerate(images):
            score = {self.rerank: f"{scores[i]:.5f}"} if scores else {}
            save_image(self.file(number, prompt, i), to_pil(image), **self.chunks(number, prompt, i), **score)

    def close(self):
        if not self.images:
            return
        columns = self.cfg.n if len(self.images) > 1 else min(self.cfg.n, max(4, round(self.cfg.n**0.5)))
        score = {self.rerank: json.dumps(self.scores)} if self.scores[0] else {}
        about = dict(prompt="\n".join(self.prompts), model=self.model, settings=json.dumps(self.settings), **score)
        save_image(self.path, grid_image(torch.cat(self.images), columns), **about)


# --- the way from prompts to files -----------------------------------------------------------------------


def load(args):
    """-> the prior, the one that enlarges or None, the captioner or the towers or None."""
    device, dtype = pick_device(args.device), torch.bfloat16 if args.half else torch.float32
    last, compiled = args.vq, args.compile  # --vq decodes what comes last
    painter = Painter(args.model, device, dtype, "" if args.enlarge else last, compiled=compiled)
    larger = Painter(args.enlarge, device, dtype, last, compiled=compiled) if args.enlarge else None
    judge = Painter(args.captioner, device, dtype) if args.captioner else None
    if args.towers:
        judge = Painter(args.towers, device, dtype, kind="contrast")
    if larger and not larger.prior.cfg.low:
        raise ValueError(f"{args.enlarge} does not enlarge pictures; train a prior with --low 2")
    if args.captioner and judge.prior.cfg.order != "image":
        raise ValueError(f"{args.captioner} is no captioner; train one with --order image")
    if (args.caption is not None) != (painter.prior.cfg.order == "image"):
        raise ValueError(f"{args.model}: --caption needs a prior of --order image, and drawing one of --order text")
    return painter, larger, judge


def finish(prompt, codes, painter, larger, judge, cfg, args):
    """A prompt's codes as painter drew them -> images (n, 3, H, W), the best ones, enlarged; their scores or None."""
    scores = None
    if args.best_of:
        loss = code_losses(painter, judge, prompt, codes, args.batch)  # without a judge their likelihood
        codes, scores = codes[loss.argsort()[: cfg.n]], loss.sort().values[: cfg.n].tolist()
    if larger:
        codes, painter = enlarge(larger, painter, prompt, codes, cfg, args), larger
    return torch.cat([painter.images(part) for part in codes.split(args.batch)]), scores


def main():
    args = flags()
    cfg = pick(SampleConfig, args)
    painter, larger, judge = load(args)
    if args.caption is not None:
        print("\n".join(painter.captions(read_picture("--caption", args.caption, painter.size)[None], cfg)[0]))
        return

    known = known_codes(painter, args)
    total = 1 if args.prompts is None else sum(1 for _ in read_prompts(args.prompts))
    if not total:
        raise ValueError(f"no prompts in {args.prompts}")
    prompts = [(0, args.prompt)] if args.prompts is None else read_prompts(args.prompts)
    hashes = [p.hash for p in (painter, larger, judge) if p] + ([(larger or painter).vq.hash] if args.vq else [])
    out = Output(args, cfg, "+".join(hashes), total)
    frames, failures = Frames(args.every) if args.every else None, []
    with Bar(total) as bar:

        def todo():
            for number, prompt in prompts:
                if out.has(number, prompt):
                    bar.update(1)
                else:
                    yield number, prompt

        def failed(number, prompt, e):
            failures.append(f"{prompt!r}: {e}")

        many = replace(cfg, n=args.best_of or cfg.n)
        for number, prompt, codes in painter.draw(todo(), many, known, args.batch, bar, frames, failed):
            try:
                own = replace(cfg, seed=cfg.seed + number * many.n)
                images, scores = finish(prompt, codes, painter, larger, judge, own, args)
            except RuntimeError as e:  # no memory left is one
                failed(number, prompt, e)
                continue
            out.add(number, prompt, images, scores, frames.animation(painter, number) if frames else None)
    out.close()
    cut = painter.text.n_cut
    print(
        f"{out.path}: {cfg.n} x {total - len(failures)} pictures"
        + (f"; {cut} prompts were too long and were cut" if cut else "")
    )
    if failures:
        raise ValueError(f"{len(failures)} of {total} prompts could not be drawn: {'; '.join(failures[:3])}")


if __name__ == "__main__":
    run(main)
