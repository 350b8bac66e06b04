"""Draw pictures for prompts.

python sample.py --prompt "a large red circle above a small blue square"
python sample.py --model out/prior --prompt "woman pilot" --n 16 --cfg_scale 3
python sample.py --model out/prior --prompts prompts.txt --out out/pictures
python sample.py --prompt "three green triangles" --image scene.png --keep_rows 4
"""

import argparse
import json
import re
from dataclasses import asdict
from pathlib import Path

import torch

from minit2i.data import BadEntry, crop, grid_image, open_rgb, to_pil
from minit2i.sample import PRETRAINED, Painter, SampleConfig
from minit2i.train import add_flags, pick, pick_device, run, save_image


def first_codes(painter, path, rows):
    """The codes (1, rows * w) of the first rows of a picture file."""
    try:
        image = crop(open_rgb(path), painter.size)
    except BadEntry as e:
        raise ValueError(f"--image {path}: {e}") from None
    h = painter.prior.cfg.grid_h
    if not 0 < rows <= h:
        raise ValueError(f"--keep_rows {rows} is not between 1 and the {h} rows of codes of this model")
    codes = painter.vq.encode(image[None].to(painter.device))
    return codes[:, :rows].flatten(1)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default=str(PRETRAINED), help="checkpoint folder of a prior [the one that ships]")
    parser.add_argument(
        "--vq", default="", help="decode with this tokenizer: a finetuned or enlarging one of the same codes"
    )
    parser.add_argument("--prompt", help="what to draw; '' draws without a caption")
    parser.add_argument("--prompts", help="a text file with one prompt a line")
    parser.add_argument(
        "--out", default="sample.png", help="NAME.png for a grid, or a folder for single PNGs [sample.png]"
    )
    parser.add_argument("--image", help="a picture to finish: its first --keep_rows rows of codes are kept")
    parser.add_argument("--keep_rows", type=int, help="rows of codes kept of --image [half of them]")
    parser.add_argument("--batch", type=int, default=64, help="pictures drawn at a time [64]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--half", action=argparse.BooleanOptionalAction, default=False, help="bfloat16 weights")
    add_flags(parser, SampleConfig)
    args = parser.parse_args()
    if (args.prompt is None) == (args.prompts is None):
        raise ValueError("give either --prompt or --prompts")
    if args.keep_rows is not None and not args.image:
        raise ValueError("--keep_rows needs --image, the picture to finish")
    cfg = pick(SampleConfig, args)
    prompts = (
        [args.prompt]
        if args.prompts is None
        else [line.strip() for line in Path(args.prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
    )
    if not prompts:
        raise ValueError(f"no prompts in {args.prompts}")

    painter = Painter(args.model, pick_device(args.device), torch.bfloat16 if args.half else torch.float32, args.vq)
    first = None
    if args.image:
        rows = painter.prior.cfg.grid_h // 2 if args.keep_rows is None else args.keep_rows
        first = first_codes(painter, args.image, rows)
    settings = asdict(cfg) | (
        {"image": args.image, "keep_rows": first.shape[1] // painter.prior.cfg.grid_w} if args.image else {}
    )
    sheet, out = [], Path(args.out)
    for k, (prompt, images) in enumerate(painter.paint(prompts, cfg, first, args.batch, bar=True)):
        if out.suffix.lower() == ".png":
            sheet.append(images.cpu())
            continue
        name = re.sub(r"[^\w]+", "-", prompt)[:60].strip("-") or "picture"
        for i, image in enumerate(images):
            save_image(
                out / f"{k:05d}-{name}-{i}.png",
                to_pil(image),
                prompt=prompt,
                model=painter.hash,
                settings=json.dumps(settings | {"seed": cfg.seed + i}),
            )
    if sheet:
        columns = cfg.n if len(prompts) > 1 else min(cfg.n, max(4, round(cfg.n**0.5)))
        save_image(
            out,
            grid_image(torch.cat(sheet), columns),
            prompt="\n".join(prompts),
            model=painter.hash,
            settings=json.dumps(settings),
        )
    cut = painter.text.n_cut
    print(f"{out}: {cfg.n} x {len(prompts)} pictures" + (f"; {cut} prompts were too long and were cut" if cut else ""))


if __name__ == "__main__":
    run(main)
