"""A toy experiment: a deep prior in float16 that breaks, and what each remedy of fp16.py is worth.

    python -m minit2i.experiments.stability --out stability.png

A narrow prior of 24 layers learns striped images without warm-up, from an initialisation with large queries, keys and
residual branches.  `none` is float16 throughout, norms included, with float32 master weights; each other run adds
what its name says, `all` adds everything, `float32` is the same training in float32 without any.  A run ends when the
loss or a weight is NaN or Inf; "skipped" counts the steps that skipped the update of the model, or of a part of it.
"""

import math
import time
from dataclasses import asdict, dataclass
from typing import Annotated

import torch
from torch.func import functional_call

from minit2i.config import Settings, above, at_least, pick
from minit2i.flags import add_flags, new_parser
from minit2i.fp16 import BlockScaler, PBLayerNorm
from minit2i.gpt import build_prior
from minit2i.plot import plot, save_image, smooth
from minit2i.train import Processes, run

TOY = dict(
    n_layer=24, n_head=2, n_embd=64, text_len=4, norm="pb_layernorm", mlp="gelu", qk_norm=False,
    n_vocab=20, n_codes=16, grid_h=8, grid_w=8,
)  # fmt: skip
FLOAT32 = {"float32_parts": True, "fp32_logits": True}
COGVIEW = {"pb_relax": True, "pb_norm": True, "sandwich": True, "embed_grad": 0.1}
RUNS = {  # what each adds to `none`: fields of GPTConfig, and the switches of train_toy
    "none": {},
    "PB-Relax attention": {"pb_relax": True},
    "PB-Relax LayerNorm": {"pb_norm": True},
    "Sandwich-LN": {"sandwich": True},
    "embedding gradient x 0.1": {"embed_grad": 0.1},
    "float32 parts": FLOAT32,
    "loss scaling": {"loss_scale": True},
    "loss scaling, CogView's four": COGVIEW | {"loss_scale": True},
    "loss scaling, float32 parts": FLOAT32 | {"loss_scale": True},
    "block scales, float32 parts": FLOAT32 | {"block_scale": True},
    "all": FLOAT32 | COGVIEW | {"block_scale": True},
    "float32": {"half": False},
}


@dataclass(frozen=True)
class StabilityConfig(Settings):
    """The toy training."""

    out: Annotated[str, "the plot"] = "stability.png"
    steps: Annotated[int, "steps of each run", at_least(1)] = 60
    batch: Annotated[int, "images per step", at_least(1)] = 4
    lr: Annotated[float, "learning rate", above(0)] = 2e-3
    scores: Annotated[float, "queries and keys are initialised this many times larger"] = 600.0
    branches: Annotated[float, "residual branches are initialised this many times larger"] = 300.0


def stripes(step, batch):
    """Captions 1, c, 2, pad, and images of stripes in the direction c: {"text" (B, 4), "codes" (B, 64)}."""
    g = torch.Generator().manual_seed(step)
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


def train_toy(cfg, half=True, pb_norm=False, float32_parts=False, loss_scale=False, block_scale=False, **fields):
    """-> losses of the steps survived, the first place that was NaN or Inf (or ""), number of skipped updates."""
    torch.manual_seed(0)
    model = build_prior(TOY | fields)
    provoke(model, cfg.scores, cfg.branches)
    for m in model.modules():
        if isinstance(m, PBLayerNorm) and not pb_norm:
            m.forward = m.plain
    procs = Processes("cpu", "fp16" if half else "fp32")
    scaler = BlockScaler(model, procs) if block_scale else torch.amp.GradScaler("cpu", enabled=loss_scale)
    optimizer, losses, skipped = torch.optim.AdamW(model.parameters(), cfg.lr), [], 0
    places = first_nonfinite(model)
    for step in range(cfg.steps):
        batch, weights = stripes(step, cfg.batch), dict(model.named_parameters())
        if half and not float32_parts:
            weights = {k: w.half() for k, w in weights.items()}
        with torch.autocast("cpu", torch.float16, enabled=half and float32_parts):
            sums = functional_call(model, weights, (batch,))
        loss = sums["image"] / batch["codes"].numel() + sums["text"] / batch["text"].numel()
        if not loss.isfinite():
            return losses, places[0] if places else "loss", skipped
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
            return losses, f"gradient of {bad[-1]}" if bad else "weight", skipped
    return losses, "", skipped


def curves(results, steps):
    """{run: result of train_toy} -> {name: points}, each the mean of five steps; names say where a run ended early."""
    ended = {k: "" if len(v[0]) == steps else f" (ended after {len(v[0])})" for k, v in results.items()}
    return {k + ended[k]: smooth([*enumerate(v[0], 1)], 5) for k, v in results.items()}


def main():
    parser = new_parser(__doc__)
    add_flags(parser, StabilityConfig)
    cfg, results = pick(StabilityConfig, parser.parse_args()), {}
    print("| run | steps | skipped | first NaN or Inf | loss of the last 10 | seconds |\n|---|---|---|---|---|---|")
    for name, how in RUNS.items():
        start = time.perf_counter()
        losses, place, skipped = results[name] = train_toy(cfg, **how)
        last = sum(losses[-10:]) / len(losses[-10:]) if losses else math.nan
        took = time.perf_counter() - start
        print(f"| {name} | {len(losses)} | {skipped} | {place or 'nothing'} | {last:.2f} | {took:.0f} |", flush=True)
    save_image(cfg.out, plot(curves(results, cfg.steps), "loss", 830, 360), settings=asdict(cfg))
    print(f"{cfg.out} holds the curves")


if __name__ == "__main__":
    run(main)
