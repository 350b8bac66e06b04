"""A toy experiment: a deep prior in float16 that breaks, and what each remedy of fp16.py is worth.

    python -m minit2i.experiments.stability --out residual.png
    python -m minit2i.experiments.stability --scores 640 --lr 0.08 --batch 2 --out attention.png
    python -m minit2i.experiments.stability --runs "loss scaling" --seeds 1 --steps 20 --out pilot.png

CogView tries its remedies on a toy of 64 layers with a large learning rate (arXiv:2105.13290 fig. 3b): without
Sandwich-LN the residual stream overflows, without PB-Relax attention does, and only with both training continues.
Here a narrow prior of as many layers learns striped images at such a rate, without warm-up, so the residual stream
overflows after some steps.  Attention takes longer than a toy runs: `--scores` begins with larger queries and keys.

`float16` is float16 throughout, norms included, with float32 master weights; "float32 parts" are DALL-E's (residual
stream, norms, embeddings, logits).  A run ends when the loss or a weight is NaN or Inf; "skipped" counts the steps
that skipped the update of the model, or of a part of it.  Finished runs are kept in a .json beside the plot: started
again, the command does the others.
"""

import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch.func import functional_call

from minit2i.checkpoint import write_file
from minit2i.config import Settings, above, at_least, pick
from minit2i.flags import add_flags, new_parser
from minit2i.fp16 import BlockScaler, PBLayerNorm
from minit2i.gpt import build_prior
from minit2i.plot import plot, save_image, smooth
from minit2i.train import Processes, run

TOY = dict(
    n_head=2, n_embd=64, text_len=4, norm="pb_layernorm", mlp="gelu", qk_norm=False,
    n_vocab=20, n_codes=16, grid_h=8, grid_w=8,
)  # fmt: skip
FLOAT32, SCALE = {"float32_parts": True, "fp32_logits": True}, {"loss_scale": True}
PB, SANDWICH = {"pb_relax": True, "pb_norm": True}, {"sandwich": True}
COGVIEW = PB | SANDWICH | {"embed_grad": 0.1}
RUNS = {  # fields of GPTConfig, and the switches of train_toy
    "float16": {},
    "float16, CogView's": COGVIEW,
    "float16, loss scaling": SCALE,
    "float16, loss scaling, PB-Relax": SCALE | PB,
    "float16, loss scaling, Sandwich-LN": SCALE | SANDWICH,
    "float16, loss scaling, both": SCALE | PB | SANDWICH,
    "float16, loss scaling, CogView's": SCALE | COGVIEW,
    "float32 parts": FLOAT32,
    "float32 parts, loss scaling": FLOAT32 | SCALE,
    "float32 parts, block scales": FLOAT32 | {"block_scale": True},
    "float32 parts, block scales, CogView's": FLOAT32 | COGVIEW | {"block_scale": True},
    "float32": {"half": False},
    "float32, CogView's": {"half": False} | COGVIEW,
}


@dataclass(frozen=True)
class StabilityConfig(Settings):
    """The toy training."""

    out: Annotated[str, "the plot; finished runs stand in a .json beside it"] = "stability.png"
    runs: Annotated[str, "only the runs that have this in their name"] = ""
    seeds: Annotated[int, "seeds of each run", at_least(1)] = 3
    n_layer: Annotated[int, "layers", at_least(1)] = 64
    steps: Annotated[int, "steps of each run", at_least(1)] = 60
    batch: Annotated[int, "images per step", at_least(1)] = 1
    lr: Annotated[float, "learning rate at the start; it falls linearly to 0", above(0)] = 0.2
    scores: Annotated[float, "queries and keys are initialised this many times larger", above(0)] = 1.0
    branches: Annotated[float, "residual branches are initialised this many times larger", above(0)] = 1.0


def stripes(step, batch, seed=0):
    """Captions 1, c, 2, pad, and images of stripes in the direction c: {"text" (B, 4), "codes" (B, 64)}."""
    g = torch.Generator().manual_seed(seed * 1_000_003 + step)
    c = torch.randint(0, 16, (batch, 1), generator=g)
    text = torch.cat([torch.ones_like(c), 3 + c, torch.full_like(c, 2), torch.full_like(c, TOY["n_vocab"] + 3)], 1)
    n = torch.arange(64)[None]
    codes = (c + (1 + c % 4) * (n // 8) + (1 + c // 4) * (n % 8)) % 16
    noise = torch.rand(codes.shape, generator=g) < 0.05
    return {"text": text, "codes": torch.where(noise, torch.randint(0, 16, codes.shape, generator=g), codes)}


def provoke(model, scores, branches):
    """Provoke large activations: enlarge queries and keys, and what the branches add to the residual stream."""
    with torch.no_grad():
        for block in model.blocks:
            block.attn.f.qkv.weight[: 2 * TOY["n_embd"]] *= scores
            for w in (block.attn.f.out.weight, block.mlp.f.down.weight):
                w *= branches


def first_nonfinite(model):
    """A list that receives the name of the first module whose output is NaN or Inf."""
    places = []

    def watch(name):
        def hook(module, args, out):
            if not places and torch.is_tensor(out) and not out.isfinite().all():
                places.append(name)

        return hook

    for name, m in model.named_modules():
        m.register_forward_hook(watch(name or "loss"))
    return places


def toy_model(cfg, seed, pb_norm, fields):
    """The provoked prior; pb_norm: its LayerNorms divide by the largest value first."""
    torch.manual_seed(seed)
    model = build_prior(TOY | {"n_layer": cfg.n_layer} | fields)
    provoke(model, cfg.scores, cfg.branches)
    for m in model.modules():
        if isinstance(m, PBLayerNorm) and not pb_norm:
            m.forward = m.plain
    return model


def mean_loss(sums, batch):
    """Nats per code plus nats per text position."""
    return sums["image"] / batch["codes"].numel() + sums["text"] / batch["text"].numel()


def train_toy(
    cfg, seed=0, half=True, pb_norm=False, float32_parts=False, loss_scale=False, block_scale=False, **fields
):
    """-> losses of the steps survived, the first place that was NaN or Inf (or ""), number of skipped updates, loss of
    the last weights on other images in float32 (nan if the run ended early)."""
    model, procs = toy_model(cfg, seed, pb_norm, fields), Processes("cpu", "fp16" if half else "fp32")
    scaler = BlockScaler(model, procs) if block_scale else torch.amp.GradScaler("cpu", enabled=loss_scale)
    optimizer, losses, skipped = torch.optim.AdamW(model.parameters(), cfg.lr), [], 0
    places = first_nonfinite(model)
    for step in range(cfg.steps):
        optimizer.param_groups[0]["lr"] = cfg.lr * (1 - step / cfg.steps)
        batch, weights = stripes(step, cfg.batch, seed), dict(model.named_parameters())
        if half and not float32_parts:
            weights = {k: w.half() for k, w in weights.items()}
        with torch.autocast("cpu", torch.float16, enabled=half and float32_parts):
            sums = functional_call(model, weights, (batch,))
        loss = mean_loss(sums, batch)
        if not loss.isfinite():
            return losses, places[0] if places else "loss", skipped, math.nan
        losses.append(float(loss.detach()))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        bad = [k for k, w in model.named_parameters() if w.grad is not None and not w.grad.isfinite().all()]
        torch.nn.utils.clip_grad_norm_([w for w in model.parameters() if w.grad is not None], 1.0)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        skipped = scaler.n_skipped if block_scale else skipped + (scaler.get_scale() < before)
        if not all(w.isfinite().all() for w in model.parameters()):
            return losses, f"gradient of {bad[-1]}" if bad else "weight", skipped, math.nan
    with torch.no_grad():
        return losses, "", skipped, float(mean_loss(model(others := stripes(10**6, 32)), others))


# --- runs, table, plot -----------------------------------------------------------------------------------


def train_all(cfg, path):
    """Do the runs that the file does not hold yet -> {run: [(losses, place, skipped, loss) of each seed]}."""
    settings = {k: v for k, v in asdict(cfg).items() if k not in ("out", "runs", "seeds")}
    kept = json.loads(path.read_text()) if path.exists() else {"settings": settings, "runs": {}}
    if kept["settings"] != settings:
        raise ValueError(f"{path} holds runs with the settings {kept['settings']}; use another --out")
    chosen = {name: how for name, how in RUNS.items() if cfg.runs in name}
    for seed in range(cfg.seeds):
        for name, how in chosen.items():
            if (key := f"{name} / seed {seed}") not in kept["runs"]:
                kept["runs"][key] = train_toy(cfg, seed, **how)
                write_file(path, json.dumps(kept))
                print(f"{key}: {len(kept['runs'][key][0])} steps", flush=True)
    return {name: [kept["runs"][f"{name} / seed {seed}"] for seed in range(cfg.seeds)] for name in chosen}


def span(values):
    """The least and the largest of some numbers, or what they all are."""
    return str(min(values)) if min(values) == max(values) else f"{min(values)}..{max(values)}"


def table(results, steps):
    """{run: [(losses, place, skipped, loss) of each seed]} -> lines of Markdown."""
    lines = [
        f"| run | steps of {steps} | skipped | first NaN or Inf | loss (of those that lived) |",
        "|---|---|---|---|---|",
    ]
    for name, seeds in results.items():
        losses, places, skips, last = zip(*seeds)
        last, places = [x for x in last if not math.isnan(x)], sorted({place for place in places if place})
        loss = f"{statistics.mean(last):.2f} ({min(last):.2f}..{max(last):.2f})" if last else ""
        survived, skipped = span([*map(len, losses)]), span(skips)
        lines.append(f"| {name} | {survived} | {skipped} | {', '.join(places) or 'nothing'} | {loss} |")
    return lines


def curves(results, steps):
    """{run: results} -> {name: points} of the seed that ended first, each point the mean of five steps."""
    first = {name: min((losses for losses, *_ in seeds), key=len) for name, seeds in results.items()}
    ended = {name: "" if len(losses) == steps else f" (ended after {len(losses)})" for name, losses in first.items()}
    return {name + ended[name]: smooth([*enumerate(y, 1)], 5) for name, y in first.items() if y}


def main():
    parser = new_parser(__doc__)
    add_flags(parser, StabilityConfig)
    cfg = pick(StabilityConfig, parser.parse_args())
    results = train_all(cfg, Path(cfg.out).with_suffix(".json"))
    print("\n".join(table(results, cfg.steps)))
    save_image(cfg.out, plot(curves(results, cfg.steps), "loss", 830, 360), settings=asdict(cfg))
    print(f"{cfg.out} holds the curves")


if __name__ == "__main__":
    run(main)
