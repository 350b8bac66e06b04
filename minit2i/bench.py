"""How fast this machine trains and samples, beside a bare matrix product measured in the same run.

    python -m minit2i.bench

Every figure is the median of several rounds in which all take turns, so that a change of the machine's
speed touches all alike.  FLOPs are those of the matrix products of the model as it is: 2 a weight and
position forward, twice that backward, attention counted over the causal half only.
"""

import argparse
import statistics
import time

import torch

from minit2i.gpt import GPT, GPTConfig
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


def training_flops(cfg, batch):
    """FLOPs of one training step of the prior."""
    s = cfg.length - 1
    model = GPT(cfg)
    blocks = sum(w.numel() for w in model.blocks.parameters() if w.dim() == 2)
    heads = (cfg.text_len - 1) * cfg.n_embd * cfg.n_vocab + cfg.n_image * cfg.n_embd * cfg.n_codes
    attention = cfg.n_layer * 2 * cfg.n_embd * s * (s + 1) / 2
    return 3 * 2 * batch * (s * blocks + heads + attention)


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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="how often each is measured [7]")
    parser.add_argument("--batch", type=int, default=16, help="pictures of a training step [16]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the prior for training")
    args = parser.parse_args()
    device = torch.device(args.device)
    precision = pick_precision("auto", device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    n = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

    prior, vq = GPT(PRIOR).to(device), VQ(VQConfig()).to(device)
    drawing = GPT(PRIOR).to(device).eval().requires_grad_(False)
    text = torch.randint(0, PRIOR.n_vocab, (1, PRIOR.text_len), device=device)
    images = torch.rand(32, 3, 64, 64, device=device) * 2 - 1
    work = {
        "matrix product": lambda: a @ b,
        "train prior": prior_step(prior, args.batch, device, precision, args.compile),
        "sample, batch 1": lambda: generate(drawing, text, text[0], SampleConfig(n=1)),
        "sample, batch 16": lambda: generate(drawing, text, text[0], SampleConfig(n=16)),
        "train tokenizer": vq_step(vq, images, device, precision),
        "encode": lambda: vq.encode(images),
    }
    times = {name: [] for name in work}
    for k in range(args.rounds + 2):
        for name, f in work.items():
            t = seconds(f, device)
            if k >= 2:  # the first two rounds warm up
                times[name].append(t)
    t = {name: statistics.median(v) for name, v in times.items()}
    peak, flops = 2 * n**3 / t["matrix product"], training_flops(PRIOR, args.batch)
    print(
        f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}, {precision}; "
        f"prior {PRIOR.n_layer} layers, {PRIOR.n_embd} wide, {PRIOR.text_len}+{PRIOR.n_image} positions"
    )
    print(f"matrix product {n}^3     {peak / 1e12:8.2f} TFLOP/s")
    print(
        f"train prior, batch {args.batch:3}  {args.batch * PRIOR.length / t['train prior']:8.0f} tokens/s, "
        f"{flops / t['train prior'] / peak:.0%} of the matrix product"
    )
    for b in (1, 16):
        print(
            f"sample, batch {b:2} guided {t[f'sample, batch {b}'] / b:8.3f} s a picture of {PRIOR.n_image} codes (float32)"
        )
    print(f"train tokenizer        {32 / t['train tokenizer']:8.0f} images/s at 64x64, stride {vq.cfg.stride}")
    print(f"encode                 {32 / t['encode']:8.0f} images/s (float32)")


if __name__ == "__main__":
    run(main)
