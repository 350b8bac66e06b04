"""Compare tokenizers: train each value of a flag on the same data and budget, and tabulate.

    python -m minit2i.experiments.tokenizers --out out/quantizers --data path/to/images --steps 1000
    python -m minit2i.experiments.tokenizers --out out/backbones --data images --vary backbone --values vqvae,vit
    python -m minit2i.experiments.tokenizers --out out/figure2 --data images --values gumbel_st,st,ema,fixed --seeds 3

trains every quantizer (or every value of another flag) with the same backbone, and writes table.md and curves.png: the
mean of the seeds with their range, and which values differ by more than that.  The last command is CogView's figure 2
(arXiv:2105.13290).  A value may bring its own flags: --values "ema,st --l2_norm".
All other flags go to train_vq.py.  The command resumes where it stopped; each run is an ordinary folder of train_vq.py.

`evaluate tokenizer` measures one tokenizer with the functions below.

Shapes: B batch, H W image, h w code grid, V codebook size.
"""

import json
import math
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from minit2i.checkpoint import write_file
from minit2i.config import Settings, at_least, pick
from minit2i.flags import add_flags, new_parser
from minit2i.metrics import code_stats, psnr, sharpness, ssim
from minit2i.plot import beside, grid_image, plot, read_log, save_image, smooth
from minit2i.train import run
from minit2i.vq import QUANTIZERS, shrink

CHECKOUT = Path(__file__).parents[2]  # the training scripts are here, unless the package was installed alone

# --- one tokenizer -----------------------------------------------------------------------------------


@torch.no_grad()
def quality(vq, batches, tile=0):
    """Mean PSNR and SSIM, sharpness relative to the inputs, codebook usage, and n; code counts (V,).

    batches: iterable of images (B, 3, H, W), at the size that the tokenizer's decoder returns.
    """
    device, sums = next(vq.parameters()).device, torch.zeros(5, dtype=torch.float64)
    counts = torch.zeros(vq.cfg.n_codes)
    for images in batches:
        codes = vq.encode(shrink(images.to(device), vq.cfg.upscale), tile)
        recon = vq.decode(codes, tile).cpu()
        counts += torch.bincount(codes.flatten(), minlength=len(counts)).cpu()
        values = psnr(recon, images), ssim(recon, images), sharpness(recon), sharpness(images), torch.ones(len(images))
        sums += torch.stack([v.sum() for v in values])
    use, perplexity = code_stats(counts)
    figures = {"psnr": float(sums[0] / sums[4]), "ssim": float(sums[1] / sums[4])}
    figures |= {"sharpness": float(sums[2] / sums[3]), "code_use": use, "perplexity": perplexity, "n": int(sums[4])}
    return figures, counts


def code_colors(vq):
    """A colour per code (V, 3) in [-1, 1]: ranks along three principal directions, so similar codes look similar."""
    codes = vq.quantizer.lookup(torch.arange(vq.cfg.n_codes, device=next(vq.parameters()).device)).float()
    codes = codes - codes.mean(0)
    _, _, directions = torch.linalg.svd(codes, full_matrices=False)
    ranks = (codes @ directions[:3].t()).argsort(0).argsort(0)  # (V, up to 3)
    ranks = torch.cat([ranks, ranks[:, :1].expand(-1, 3 - ranks.shape[1])], 1)
    return ranks / max(1, vq.cfg.n_codes - 1) * 2 - 1


def usage_chart(counts, width, height=90):
    """Use of each code (V,), most used first, on a logarithmic scale -> PIL image."""
    values = (counts.sort(descending=True).values + 1).log()
    values = values / values.max().clamp_min(1e-9)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for x in range(width):
        value = float(values[x * len(values) // width])
        draw.line([(x, height), (x, height - round(value * (height - 4)))], fill="#1d4ed8")
    return image


@torch.no_grad()
def tokenizer_grid(vq, images, counts, text, tile=0):
    """images (B, 3, H, W) -> PIL image with rows input, reconstruction, error x2 and code map; text and usage below."""
    device = next(vq.parameters()).device
    codes = vq.encode(shrink(images.to(device), vq.cfg.upscale), tile)
    recon = vq.decode(codes, tile).cpu()
    error = ((recon - images).abs() * 2 - 1).clamp(-1, 1)  # white from half of the range on
    code_map = F.interpolate(code_colors(vq)[codes].permute(0, 3, 1, 2), images.shape[-2:]).cpu()  # (B, 3, H, W)
    grid = grid_image(torch.cat([images, recon, error, code_map]), len(images))
    whole = Image.new("RGB", (max(grid.width, 420), grid.height + 150), "white")
    whole.paste(grid, (0, 0))
    ImageDraw.Draw(whole).text((4, grid.height + 4), text, fill="black")
    whole.paste(usage_chart(counts, whole.width), (0, grid.height + 60))
    return whole


# --- many --------------------------------------------------------------------------------------------


def run_script(script, flags, out):
    """Run a training script of this checkout, resuming the run in `out` if there is one.

    ValueError if it fails, or if the run in `out` was begun with other flags, which OUT/flags.json says.
    """
    if not (CHECKOUT / script).exists():
        raise ValueError(f"{CHECKOUT / script} is not there; run this in a checkout of the repository")
    path, line = Path(out, "flags.json"), [script, *flags]
    if "--steps" in line:  # more of them are no other run
        at = line.index("--steps")
        line = line[:at] + line[at + 2 :]
    if path.exists() and (begun := json.loads(path.read_text())) != line:
        other = [word for word in (*begun, *line) if word not in begun or word not in line]
        raise ValueError(f"{out} holds a run with other flags ({' '.join(other)}); use another --out")
    write_file(path, json.dumps(line) + "\n")
    if subprocess.run([sys.executable, CHECKOUT / script, *flags, "--out", str(out), "--resume"]).returncode:
        raise ValueError(f"the run {out} failed; its error is above")


def spread(values, form):
    """The mean over the seeds, and with several of them their range, as text."""
    mean, low, high = (f"{f(values):{form}}" for f in (statistics.mean, min, max))
    return f"{mean} ({low} to {high})" if len(values) > 1 else mean


def last(records, key):
    """The last evaluation's value in a run's log; NaN if it has none."""
    return [r for r in records if "val_psnr" in r][-1].get(key, math.nan)


def table_row(name, runs):
    """Logs of one value's runs (one per seed) -> its row of the table."""
    training = [[r for r in records if "recon" in r] for records in runs]
    if not all(training):
        raise ValueError(f"{name} logged no loss; use a --log_every of at most --steps, and another --out")
    loss = [statistics.mean(r["recon"] for r in rs[-max(1, len(rs) // 10) :]) for rs in training]
    measures = {"val_psnr": ".2f", "val_ssim": ".3f", "code_use": ".1%", "val_perplexity": ".0f"}
    cells = [spread(loss, ".5f"), *(spread([last(r, k) for r in runs], form) for k, form in measures.items())]
    speed = statistics.median(r["images_per_s"] for rs in training for r in rs)
    return f"| {name} | {' | '.join(cells)} | {speed:.0f} |"


def verdict(psnr):
    """{value: PSNR of each seed} -> one sentence: which values the seeds tell apart from the best."""
    best = max(psnr, key=lambda name: statistics.mean(psnr[name]))
    if len(psnr) == 1 or min(map(len, psnr.values())) == 1:
        return "Undecided: it takes several values, and several seeds of each."
    below, overlap = [], []
    for name in (name for name in psnr if name != best):
        gap = statistics.mean(psnr[best]) - statistics.mean(psnr[name])
        (below if max(psnr[name]) < min(psnr[best]) else overlap).append(f"{name} (by {gap:.2f} dB)")
    parts = {f"every seed of {best} is above those of": below, f"undecided, for the seeds overlap: {best} or": overlap}
    return "; ".join(f"{text} {', '.join(names)}" for text, names in parts.items() if names) + "."


def curve(runs, key, width):
    """Logs -> [(step, mean over the runs)], smoothed over `width` points."""
    points = {}
    for r in (r for records in runs for r in records if key in r):
        points.setdefault(r["step"], []).append(r[key])
    return smooth([(step, statistics.mean(values)) for step, values in sorted(points.items())], width)


def report(out, vary, folders):
    """{value: folders, one per seed} of finished runs -> table and verdict; writes table.md and curves.png."""
    logs = {name: [read_log(Path(f, "log.jsonl")) for f in runs] for name, runs in folders.items()}
    heading = f"| {vary} | loss | PSNR, dB | SSIM | codes used | perplexity | images/s |\n|{'---|' * 7}"
    rows = [table_row(name, runs) for name, runs in logs.items()]
    psnr = {name: [last(records, "val_psnr") for records in runs] for name, runs in logs.items()}
    table = "\n".join([heading, *rows, "", verdict(psnr)]) + "\n"
    write_file(Path(out, "table.md"), table)
    panels = []
    for key, title, width in (("recon", "reconstruction loss, training", 5), ("val_psnr", "PSNR, validation, dB", 1)):
        panels.append(plot({name: curve(runs, key, width) for name, runs in logs.items()}, title))
    save_image(Path(out, "curves.png"), beside(panels))
    return table


@dataclass(frozen=True)
class CompareConfig(Settings):
    """What to compare."""

    group = "Comparison"
    out: Annotated[str, "folder of all runs, the table and the curves"]
    vary: Annotated[str, "the flag of train_vq.py that differs"] = "quantizer"
    values: Annotated[str, "its values, each with further flags of its own if needed; on,off for a switch"] = ",".join(
        QUANTIZERS
    )
    seeds: Annotated[int, "runs of each value", at_least(1)] = 1

    def runs(self):
        """(value as written, its flags, its folder) for every run."""
        texts = self.values.split(",")
        if not all(text.strip() for text in texts):
            raise ValueError(f"--values {self.values!r}: none may be empty")
        where = "" if self.vary == "quantizer" else f"{self.vary}-"  # on and off are values of many flags
        for seed in range(self.seeds):
            for text in texts:
                value, *own = text.split()
                name = where + "-".join([value, *(word.lstrip("-") for word in own), str(seed)])
                flag = {"on": [f"--{self.vary}"], "off": [f"--no-{self.vary}"]}.get(value, [f"--{self.vary}", value])
                yield text, [*flag, *own, "--seed", str(seed)], Path(self.out, name)


def main():
    parser = new_parser(__doc__)
    add_flags(parser, CompareConfig)
    args, rest = parser.parse_known_args()
    cfg, folders = pick(CompareConfig, args), {}
    for text, flags, folder in cfg.runs():
        run_script("train_vq.py", [*rest, *flags], folder)
        folders.setdefault(text, []).append(folder)
    print(report(cfg.out, cfg.vary, folders))


if __name__ == "__main__":
    run(main)
