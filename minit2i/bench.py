"""How fast this machine trains and samples, beside a bare matrix product measured in the same run.

    python -m minit2i.bench
    python -m minit2i.bench --masks --text_len 64 --grid 32 --batch 4     # every mask beside full

Every figure is the median of several rounds in which all take turns, so that a change of the machine's
speed touches all alike.  FLOPs are those of the matrix products of the model as it is: 2 a weight and
position forward, twice that backward, attention over the pairs that the mask shows.
"""

import statistics
import time
from dataclasses import replace

import torch
import torch.nn.functional as F
from tqdm import tqdm

from minit2i.attention import Layout, attend
from minit2i.flags import new_parser
from minit2i.gpt import GPT, Cache, GPTConfig
from minit2i.masked import unmask
from minit2i.masks import MASKS
from minit2i.parallel import DTYPES
from minit2i.plan import training_flops
from minit2i.sample import SampleConfig, generate
from minit2i.train import autocast, pick_precision, run
from minit2i.vq import VQ, VQConfig

PRIOR = GPTConfig(text_len=32, n_vocab=2048, n_codes=1024, grid_h=16, grid_w=16)


def seconds(f, device):
    """Wall time of one call, the device's work included."""
    start = time.perf_counter()
    f()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(work, device, rounds):
    """Seconds of each piece of work {name: function}, the median of rounds in which all take turns."""
    times = {name: [] for name in work}
    for k in tqdm(range(rounds + 2), desc="rounds", leave=False):
        for name, f in work.items():
            t = seconds(f, device)
            if k >= 2:  # the first two rounds warm up
                times[name].append(t)
    return {name: statistics.median(v) for name, v in times.items()}


def prior_step(model, batch, device, precision, compiled):
    """A step as train_prior.py does it, on random tokens."""
    cfg, optimizer = model.cfg, torch.optim.AdamW(model.parameters(), fused=True)
    forward = torch.compile(model) if compiled else model
    text = torch.randint(0, cfg.n_vocab, (batch, cfg.text_len), device=device)
    codes = torch.randint(0, cfg.n_codes, (batch, cfg.n_image), device=device)

    def step():
        with autocast(device, precision):
            text_loss, image_loss = forward(text, codes)
        (text_loss / text.numel() + image_loss / codes.numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def mask_table(cfg, batch, device, precision, rounds, compiled):
    """Each mask beside full: one layer's attention forward and backward, a training step, 32 codes drawn of a guided batch."""
    work, text = {}, torch.randint(0, cfg.n_vocab, (2 * batch, cfg.text_len), device=device)
    dtype = DTYPES[precision]
    shape = (batch, cfg.n_head, cfg.length, cfg.n_embd // cfg.n_head)
    names = [name for name in MASKS if not Layout(name, cfg).image_ahead] + ["dalle"]
    for name in names:
        model = GPT(replace(cfg, mask=name)).to(device)
        drawing = GPT(model.cfg).to(device, dtype if device.type != "cpu" else torch.float32).requires_grad_(False)
        cache = Cache(drawing, 2 * batch, cfg.length)
        qkv = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
        if name != "dalle":
            layout = model.layouts[name]
            work[name, "attention"] = lambda qkv=qkv, layout=layout: attend(*qkv, layout).sum().backward()
        work[name, "training"] = prior_step(model, batch, device, precision, compiled)

        @torch.inference_mode()
        def draw(model=drawing, cache=cache):
            for i in range(cfg.text_len, cfg.length, cfg.n_image // 32):
                model.image_head(model.trunk(text[:, :1], i, cache))

        work[name, "drawing"] = draw
    t = medians(work, device, rounds)
    print(f"{'mask':8}" + "".join(f"{kind:>22}" for kind in ("attention", "training", "drawing")))
    for name in names:
        cells = [(t.get((name, kind)), t["full", kind]) for kind in ("attention", "training", "drawing")]
        cells = ["" if x is None else f"{1000 * x:.1f} ms, {full / x:.2f} x" for x, full in cells]
        print(f"{name:8}" + "".join(f"{cell:>22}" for cell in cells))


def vq_step(model, images, device, precision):
    """A step as train_vq.py does it."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        with autocast(device, precision):
            recon, z, codes, loss = model(images)
        ((recon.float() - images).square().mean() + loss.float()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.quantizer.update(z, codes, 0)

    return step


@torch.inference_mode()
def weights_alone(model, rows):
    """The products with every weight once a code, and nothing else: no drawing code by code is faster."""
    weights = [w for w in model.blocks.parameters() if w.dim() == 2] + [model.image_head.weight]
    inputs = [torch.randn(rows, w.shape[1], device=w.device) for w in weights]
    for _ in range(model.cfg.n_image):
        for w, x in zip(weights, inputs):
            F.linear(x, w)


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured [5]")
    parser.add_argument("--batch", type=int, default=16, help="pictures of a training step [16]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the prior")
    parser.add_argument("--masks", action="store_true", help="compare the attention masks instead")
    parser.add_argument("--text_len", type=int, default=32, help="text positions of --masks [32]")
    parser.add_argument("--grid", type=int, default=16, help="rows and columns of codes of --masks [16]")
    parser.add_argument("--precision", default="auto", help="auto, fp32, bf16, fp16")
    args = parser.parse_args()
    device = torch.device(args.device)
    precision = pick_precision(args.precision, device)
    cfg = replace(PRIOR, text_len=args.text_len, grid_h=args.grid, grid_w=args.grid) if args.masks else PRIOR
    print(
        f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}, {precision}, batch {args.batch}; "
        f"prior {cfg.n_layer} layers, {cfg.n_embd} wide, {cfg.text_len}+{cfg.n_image} positions"
    )
    if args.masks:
        return mask_table(cfg, args.batch, device, precision, args.rounds, args.compile)
    dtype = DTYPES[precision]
    n = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

    prior, vq = GPT(PRIOR).to(device), VQ(VQConfig()).to(device)
    drawing = GPT(PRIOR).to(device).eval().requires_grad_(False)
    if args.compile:
        drawing.compile_step()
    masked = GPT(replace(PRIOR, objective="masked")).to(device).eval().requires_grad_(False)
    text = torch.randint(0, PRIOR.n_vocab, (1, PRIOR.text_len), device=device)
    images = torch.rand(32, 3, 64, 64, device=device) * 2 - 1
    work = {
        "matrix product": lambda: a @ b,
        "train prior": prior_step(prior, args.batch, device, precision, args.compile),
        "sample, batch 1": lambda: generate(drawing, text, text[0], SampleConfig(n=1)),
        "sample, batch 16": lambda: generate(drawing, text, text[0], SampleConfig(n=16)),
        "weights, batch 1": lambda: weights_alone(drawing, 2),
        "weights, batch 16": lambda: weights_alone(drawing, 32),
        "masked, batch 1": lambda: unmask(masked, text, text[0], SampleConfig(n=1, steps=12)),
        "masked, batch 16": lambda: unmask(masked, text, text[0], SampleConfig(n=16, steps=12)),
        "train tokenizer": vq_step(vq, images, device, precision),
        "encode": lambda: vq.encode(images),
    }
    t = medians(work, device, args.rounds)
    peak, flops = 2 * n**3 / t["matrix product"], args.batch * training_flops(PRIOR)
    print(f"matrix product {n}^3     {peak / 1e12:8.2f} TFLOP/s")
    print(
        f"train prior, batch {args.batch:3}  {args.batch * PRIOR.length / t['train prior']:8.0f} tokens/s, "
        f"{flops / t['train prior'] / peak:.0%} of the matrix product"
    )
    for b in (1, 16):
        drawn, floor, parallel = (t[f"{kind}, batch {b}"] / b for kind in ("sample", "weights", "masked"))
        print(
            f"sample, batch {b:2} guided {drawn:8.3f} s a picture of {PRIOR.n_image} codes (float32), "
            f"{drawn / floor:.1f} x its weights' products alone; masked, 12 steps: {parallel:.3f} s"
        )
    print(f"train tokenizer        {32 / t['train tokenizer']:8.0f} images/s at 64x64, stride {vq.cfg.stride}")
    print(f"encode                 {32 / t['encode']:8.0f} images/s (float32)")


if __name__ == "__main__":
    run(main)
