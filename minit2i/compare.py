"""Look at tokenizers: one on a sheet of its pictures, many in a table with curves.

    python -m minit2i.compare --out out/compare --data path/to/pictures --size 64 --stride 4 --steps 1000
    python -m minit2i.compare --out out/backbones --vary backbone --values vqvae,vqgan,vit --data path/to/pictures

trains every quantizer (or every value of another flag) on the same data, budget and backbone, as CogView's figure 2
(arXiv:2105.13290), and writes table.md and curves.png.  A value may bring flags of its own: --values "ema,st --l2_norm".
All further flags are train_vq.py's (VQConfig, DataConfig, VQTrainConfig).  Stopped, it goes on where it was; each run
is an ordinary folder of train_vq.py.

Shapes: B batch, H W picture, h w code grid, V codebook size.
"""

import argparse
import math
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from minit2i.backbones import shrink
from minit2i.checkpoint import read_config, write_file
from minit2i.data import DataConfig, Pictures, grid_image, open_source, parse_size
from minit2i.flags import count, new_parser
from minit2i.metrics import code_stats, psnr
from minit2i.plot import beside, plot, smooth
from minit2i.sample import load_vq
from minit2i.train import pick_device, read_log, run, save_image
from minit2i.vq import QUANTIZERS

# --- one tokenizer -----------------------------------------------------------------------------------


def code_colors(model):
    """A colour for each code (V, 3) in [-1, 1], like ones for like codes: ranks along the three main directions."""
    codes = model.quantizer.lookup(torch.arange(model.cfg.n_codes, device=model.quantizer.codebook.device)).float()
    codes = codes - codes.mean(0)
    _, _, directions = torch.linalg.svd(codes, full_matrices=False)
    ranks = (codes @ directions[:3].t()).argsort(0).argsort(0)  # (V, up to 3)
    ranks = torch.cat([ranks, ranks[:, :1].expand(-1, 3 - ranks.shape[1])], 1)
    return ranks / max(1, model.cfg.n_codes - 1) * 2 - 1


def bars(counts, width, height=90):
    """How often each code was used (V,), the most used first, on a logarithmic scale."""
    values = (counts.sort(descending=True).values + 1).log()
    values = values / values.max().clamp_min(1e-9)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for x in range(width):
        value = float(values[x * len(values) // width])
        draw.line([(x, height), (x, height - round(value * (height - 4)))], fill="#1d4ed8")
    return image


@torch.no_grad()
def show(folder, images, out, n=8, most=256, size="", tile=0, device="auto"):
    """The sheet of `python -m minit2i.vq show`, from a tokenizer's folder and a source of pictures."""
    device = pick_device(device)
    model = load_vq(folder, device)
    size = [s * model.cfg.upscale for s in parse_size(size or read_config(folder)["data"]["size"])]
    cfg = DataConfig(data=images, size=f"{size[0]}x{size[1]}", captions=False)
    source = open_source(images, cfg)
    pictures = Pictures(source, range(min(most, len(source))), cfg)
    counts, values, rows, palette = torch.zeros(model.cfg.n_codes), [], [[], [], [], []], code_colors(model)
    for i in range(len(pictures)):
        image = pictures[i][0][None].to(device)
        codes = model.encode(shrink(image, model.cfg.upscale), tile)
        recon = model.decode(codes, tile)
        counts += torch.bincount(codes.flatten(), minlength=len(counts)).cpu()
        values.append(float(psnr(recon, image)))
        if i < n:
            colors = palette[codes].permute(0, 3, 1, 2)  # (1, 3, h, w)
            code_map = torch.nn.functional.interpolate(colors, image.shape[-2:])
            error = ((recon - image).abs() * 2 - 1).clamp(-1, 1)  # white where it is half of the range or more
            for row, part in zip(rows, (image, recon, error, code_map)):
                row.append(part.cpu())
    sheet = grid_image(torch.cat([part for row in rows for part in row]), len(rows[0]))
    use, perplexity = code_stats(counts)
    text = (
        f"rows: input, reconstruction, error x2, codes (like codes, like colours)\n{len(values)} pictures, PSNR "
        f"{statistics.mean(values):.2f} dB\n{use:.1%} of {model.cfg.n_codes} codes used, perplexity {perplexity:.0f}"
    )
    whole = Image.new("RGB", (max(sheet.width, 420), sheet.height + 150), "white")
    whole.paste(sheet, (0, 0))
    ImageDraw.Draw(whole).text((4, sheet.height + 4), text, fill="black")
    whole.paste(bars(counts, whole.width), (0, sheet.height + 60))
    save_image(out, whole, model=str(folder), text=text)
    print(f"{out}: {text.split(chr(10), 1)[1]}".replace("\n", ", "))


def show_command():
    """`python -m minit2i.vq show`."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "show", help="a sheet: input, reconstruction, error, code map, use of the codebook"
    )
    command.add_argument("--model", required=True, help="checkpoint folder of a tokenizer")
    command.add_argument("--images", required=True, help="a folder of pictures, tar shards, or 'scenes'")
    command.add_argument("--out", default="sheet.png", help="[sheet.png]")
    command.add_argument("--n", type=count, default=8, help="pictures shown [8]")
    command.add_argument("--most", type=count, default=256, help="pictures whose codes are counted [256]")
    command.add_argument("--size", default="", help="picture size, as in training [the tokenizer's]")
    command.add_argument("--tile", type=int, default=0, help="codes a side done at a time, for large pictures [all]")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    args = parser.parse_args()
    show(args.model, args.images, args.out, args.n, args.most, args.size, args.tile, args.device)


# --- many --------------------------------------------------------------------------------------------


def train(script, flags, out):
    """Run a training script of this checkout, or go on with the run in `out`; ValueError if it fails."""
    script = Path(__file__).parent.parent / script
    if not script.exists():
        raise ValueError(f"{script} is not there; run this in a checkout of the repository")
    if subprocess.run([sys.executable, script, *flags, "--out", str(out), "--resume"]).returncode:
        raise ValueError(f"the run {out} failed; what it said is above")


def row_of(name, runs):
    """The logs of one value's runs, one for each seed -> its line of the table: means, and the range of the PSNR."""
    training = [[r for r in records if "recon" in r] for records in runs]
    if not all(training):
        raise ValueError(f"{name} logged no loss; use a --log_every not above --steps, and another --out")
    last = [[r for r in records if "val_psnr" in r][-1] for records in runs]
    loss = statistics.mean(r["recon"] for rs in training for r in rs[-max(1, len(rs) // 10) :])
    speed = statistics.median(r["images_per_s"] for rs in training for r in rs)
    measures = "val_psnr", "val_ssim", "code_use", "val_perplexity"
    mean = {k: statistics.mean(r.get(k, math.nan) for r in last) for k in measures}
    low, high = (f(r["val_psnr"] for r in last) for f in (min, max))
    several = f" ({low:.2f} to {high:.2f})" if len(runs) > 1 else ""
    return (
        f"| {name} | {loss:.5f} | {mean['val_psnr']:.2f}{several} | {mean['val_ssim']:.3f} | "
        f"{mean['code_use']:.1%} | {mean['val_perplexity']:.0f} | {speed:.0f} |"
    )


def curve(runs, key, width):
    """Means over the runs, smoothed over `width` points: logs -> [(step, value)]."""
    points = {}
    for r in (r for records in runs for r in records if key in r):
        points.setdefault(r["step"], []).append(r[key])
    return smooth([(step, statistics.mean(values)) for step, values in sorted(points.items())], width)


def report(out, vary, folders):
    """table.md and curves.png of finished runs, {value: folders, one for each seed} -> the table."""
    logs = {name: [read_log(Path(f, "log.jsonl")) for f in runs] for name, runs in folders.items()}
    table = [
        f"| {vary} | loss | PSNR, dB | SSIM | codes used | perplexity | images/s |",
        "|---|---|---|---|---|---|---|",
    ]
    table = "\n".join(table + [row_of(name, runs) for name, runs in logs.items()]) + "\n"
    write_file(Path(out, "table.md"), table)
    panels = []
    for key, title, width in (("recon", "reconstruction loss, training", 5), ("val_psnr", "PSNR, validation, dB", 1)):
        panels.append(plot({name: curve(runs, key, width) for name, runs in logs.items()}, title))
    save_image(Path(out, "curves.png"), beside(panels))
    return table


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--out", required=True, help="folder of all runs, the table and the curves")
    parser.add_argument("--vary", default="quantizer", help="the flag of train_vq.py that differs [quantizer]")
    parser.add_argument(
        "--values",
        default=",".join(QUANTIZERS),
        help=f"its values, each with flags of its own if need be; on,off for a switch [{','.join(QUANTIZERS)}]",
    )
    parser.add_argument("--seeds", type=count, default=1, help="runs of each value [1]")
    args, rest = parser.parse_known_args()
    values, folders = args.values.split(","), {}
    if not all(value.strip() for value in values):
        raise ValueError(f"--values {args.values!r}: none may be empty")
    where = "" if args.vary == "quantizer" else f"{args.vary}-"  # on and off are values of many flags
    for seed in range(args.seeds):
        for text in values:
            value, *own = text.split()
            folder = Path(args.out, where + "-".join([value, *(word.lstrip("-") for word in own), str(seed)]))
            flag = {"on": [f"--{args.vary}"], "off": [f"--no-{args.vary}"]}.get(value, [f"--{args.vary}", value])
            train("train_vq.py", [*rest, *flag, *own, "--seed", str(seed)], folder)
            folders.setdefault(text, []).append(folder)
    print(report(args.out, args.vary, folders))


if __name__ == "__main__":
    run(main)
