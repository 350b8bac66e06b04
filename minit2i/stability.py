"""The toy experiment: a deep prior in float16 that breaks, and what each remedy of fp16.py is worth.

    python -m minit2i.stability --out stability.png

A narrow prior of 24 layers learns striped pictures, without warm-up, from a start with large queries, keys and residual
branches.  `none` is float16 throughout, norms included, with float32 masters of the weights; each other line adds one
remedy, `all` adds all of them, and `float32` is the same training in float32 without any.  A run ends when the loss or a
weight is not finite; "skipped" counts the steps that left out the update of the model, or of a block of it.
"""

import math
import time
from dataclasses import replace

import torch
from torch.func import functional_call

from minit2i.flags import count, new_parser
from minit2i.fp16 import BlockScaler, PBLayerNorm
from minit2i.gpt import GPT, GPTConfig
from minit2i.plot import plot, smooth
from minit2i.train import Processes, run, save_image

TOY = GPTConfig(
    n_layer=24, n_head=2, n_embd=64, text_len=4, norm="pb_layernorm", mlp="gelu", qk_norm=False,
    n_vocab=20, n_codes=16, grid_h=8, grid_w=8,
)  # fmt: skip
FLOAT32 = {"float32_parts": True, "fp32_logits": True}
RUNS = {  # what each adds to `none`: fields of GPTConfig, and the switches of train
    "none": {},
    "PB-Relax attention": {"pb_relax": True},
    "PB-Relax LayerNorm": {"pb_norm": True},
    "Sandwich-LN": {"sandwich": True},
    "embedding gradient x 0.1": {"embed_grad": 0.1},
    "float32 parts": FLOAT32,
    "loss scaling": {"loss_scale": True},
    "float32 parts, block scales": FLOAT32 | {"block_scale": True},
    "all": FLOAT32 | {"pb_relax": True, "pb_norm": True, "sandwich": True, "embed_grad": 0.1, "block_scale": True},
    "float32": {"half": False},
}


def stripes(step, batch):
    """Captions 1, c, 2, pad and pictures of stripes that the caption turns: text (B, 4), codes (B, 64)."""
    g = torch.Generator().manual_seed(step)
    c = torch.randint(0, 16, (batch, 1), generator=g)
    text = torch.cat([torch.ones_like(c), 3 + c, torch.full_like(c, 2), torch.full_like(c, TOY.n_vocab + 3)], 1)
    n = torch.arange(64)[None]
    codes = (c + (1 + c % 4) * (n // 8) + (1 + c // 4) * (n % 8)) % 16
    noise = torch.rand(codes.shape, generator=g) < 0.05
    return text, torch.where(noise, torch.randint(0, 16, codes.shape, generator=g), codes)


def provoke(model, scores, branches):
    """Large activations: queries and keys, and what the branches add to the residual stream, so many times larger."""
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[: 2 * TOY.n_embd] *= scores
            for w in (block.attn.out.weight, block.mlp.down.weight):
                w *= branches


def train(args, half=True, pb_norm=False, float32_parts=False, loss_scale=False, block_scale=False, **fields):
    """args: of the command -> losses of the steps survived, the first place that was not finite (or ""), updates skipped."""
    torch.manual_seed(0)
    model, p = GPT(replace(TOY, **fields)), Processes("cpu")
    provoke(model, args.scores, args.branches)
    for m in model.modules():
        if isinstance(m, PBLayerNorm) and not pb_norm:
            m.forward = m.plain
    scaler = BlockScaler(model, p) if block_scale else torch.amp.GradScaler("cpu", enabled=loss_scale)
    optimizer, losses, places, skipped = torch.optim.AdamW(model.parameters(), args.lr), [], [], 0

    def watch(name):
        def hook(module, args, out):
            if not places and torch.is_tensor(out) and not out.isfinite().all():
                places.append(name)

        return hook

    for name, m in model.named_modules():
        m.register_forward_hook(watch(name or "loss"))
    for step in range(args.steps):
        text, codes = stripes(step, args.batch)
        weights = dict(model.named_parameters())
        if half and not float32_parts:
            weights = {k: w.half() for k, w in weights.items()}
        with torch.autocast("cpu", torch.float16, enabled=half and float32_parts):
            text_loss, image_loss = functional_call(model, weights, (text, codes))
        loss = image_loss / codes.numel() + text_loss / text.numel()
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
        skipped += (scaler.get_scale() != before) if block_scale else (scaler.get_scale() < before)
        if not all(w.isfinite().all() for w in model.parameters()):
            return losses, f"gradient of {bad[-1]}", skipped
    return losses, "", skipped


def curves(results, steps):
    """{run: what train gives} -> {name: points}, each the mean of five steps; names say where a run ended early."""
    ended = {k: "" if len(v[0]) == steps else f" (ended after {len(v[0])})" for k, v in results.items()}
    return {k + ended[k]: smooth([*enumerate(v[0], 1)], 5) for k, v in results.items()}


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--out", default="stability.png", help="the plot [stability.png]")
    parser.add_argument("--steps", type=count, default=60, help="steps of each run [60]")
    parser.add_argument("--batch", type=count, default=4, help="pictures of a step [4]")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate [2e-3]")
    parser.add_argument("--scores", type=float, default=600.0, help="queries and keys start so many times larger [600]")
    parser.add_argument(
        "--branches", type=float, default=300.0, help="residual branches start so many times larger [300]"
    )
    args = parser.parse_args()
    results = {}
    print(
        f"| {'run':27} | steps | skipped | first not finite | loss of the last 10 | seconds |\n|---|---|---|---|---|---|"
    )
    for name, how in RUNS.items():
        start = time.perf_counter()
        losses, place, skipped = train(args, **how)
        last = sum(losses[-10:]) / len(losses[-10:]) if losses else math.nan
        took = time.perf_counter() - start
        print(f"| {name:27} | {len(losses)} | {skipped} | {place or 'nothing'} | {last:.2f} | {took:.0f} |", flush=True)
        results[name] = losses, place, skipped
    sheet = plot(curves(results, args.steps), "loss", 830, 360)
    save_image(args.out, sheet, settings={k: v for k, v in vars(args).items() if k != "out"})
    print(f"{args.out} holds the curves")


if __name__ == "__main__":
    run(main)
