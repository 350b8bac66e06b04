"""How fast this machine trains and samples, beside a plain matrix product measured in the same run; how much memory
it takes.

    python -m minit2i.experiments.bench
    python -m minit2i.experiments.bench --masks --text_len 64 --grid 32 --batch 4     # every mask beside causal
    python -m minit2i.experiments.bench --memory --text_len 64 --grid 32              # peak memory, 512x512 pixels

Every time is the median of several rounds in which all measurements take turns, so that a change of the machine's
speed affects all alike.  FLOPs are those of the model's matrix products: 2 per weight and position forward, twice that
backward, attention over the pairs that the mask shows.

Memory is the peak of a process of its own, weights included, beyond what it held after the same work on a tiny image.
"""

import gc
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from tqdm import tqdm

from minit2i.attention import MASKS, attend
from minit2i.config import Settings, at_least, merge, pick
from minit2i.experiments.plan import PlanConfig, memory_by_part, training_flops
from minit2i.flags import add_flags, new_parser
from minit2i.gpt import GPT, Cache, GPTConfig, build_prior
from minit2i.parallel import compile_blocks
from minit2i.sample import SampleConfig, Sampler
from minit2i.train import DTYPES, autocast, pick_device, pick_precision, run
from minit2i.vq import VQ, VQConfig, build_vq

CLEAR_REFS = Path("/proc/self/clear_refs")  # Linux
PRIOR = GPTConfig(text_len=32, n_vocab=2048, n_codes=1024, grid_h=16, grid_w=16)


@dataclass(frozen=True)
class BenchConfig(Settings):
    """What to measure."""

    rounds: Annotated[int, "how often each time is measured", at_least(1)] = 5
    batch: Annotated[int, "images of a training step", at_least(1)] = 16
    device: Annotated[str, "auto, cpu, cuda, mps"] = "auto"
    precision: Annotated[str, "of training", ("auto", *DTYPES)] = "auto"
    compile: Annotated[bool, "compile the prior"] = False
    masks: Annotated[bool, "compare the attention masks instead"] = False
    memory: Annotated[bool, "measure the peak memory instead"] = False
    text_len: Annotated[int, "text positions", at_least(3)] = 32
    grid: Annotated[int, "rows and columns of codes; --memory: of 16 pixels each", at_least(1)] = 16

    def __post_init__(self):
        super().__post_init__()
        if self.masks and self.memory:
            raise ValueError("--masks and --memory exclude each other; use one")

    @property
    def prior(self):
        """GPTConfig of the default prior with this text_len and grid."""
        return replace(PRIOR, text_len=self.text_len, grid_h=self.grid, grid_w=self.grid)


def seconds(f, device):
    """Wall time of one call, including the device's work."""
    start = time.perf_counter()
    f()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(work, device, rounds):
    """Seconds of each piece of work {name: function}: the median of rounds in which all take turns."""
    times = {name: [] for name in work}
    for k in tqdm(range(rounds + 2), desc="rounds", leave=False):
        for name, f in work.items():
            t = seconds(f, device)
            if k >= 2:  # the first two rounds warm up
                times[name].append(t)
    return {name: statistics.median(v) for name, v in times.items()}


def random_batch(cfg, batch, device):
    """Random text ids and codes: {"text" (B, T), "codes" (B, N)}."""
    text = torch.randint(0, cfg.n_vocab, (batch, cfg.text_len), device=device)
    return {"text": text, "codes": torch.randint(0, cfg.n_codes, (batch, cfg.n_image), device=device)}


def prior_step(model, batch, device, precision, compiled):
    """A training step of a prior, as in train_prior.py (in float16 with a loss scale), on random tokens."""
    optimizer, batch = torch.optim.AdamW(model.parameters(), fused=True), random_batch(model.cfg, batch, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    if compiled:
        compile_blocks(model, DTYPES[precision], device)

    def step():
        with autocast(device, precision):
            sums = model(batch)
        scaler.scale(sums["text"] / batch["text"].numel() + sums["image"] / batch["codes"].numel()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def vq_step(model, images, device, precision):
    """A training step of a tokenizer, as in train_vq.py, with an l2 loss."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        with autocast(device, precision):
            maps, z, codes, loss = model(images, train=True)
        ((maps.float() - images).square().mean() + loss.float()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.quantizer.update(z, codes, 0)

    return step


def sampling(model, text, n, **settings):
    """A function that samples n images of a caption (1, T), guided."""
    cfg = merge(SampleConfig, type(model).Sampling)(n=n, **settings)
    return lambda: model.generate({"text": text}, text[0], Sampler(cfg, range(n), text.device))


@torch.inference_mode()
def weights_alone(model, rows):
    """Multiply by every weight once per code, and nothing else: the lower bound of sampling code by code."""
    weights = [w for w in model.blocks.parameters() if w.dim() == 2] + [model.image_head.weight]
    inputs = [torch.randn(rows, w.shape[1], device=w.device) for w in weights]
    for _ in range(model.cfg.n_image):
        for w, x in zip(weights, inputs):
            F.linear(x, w)


# --- memory ----------------------------------------------------------------------------------------------


def peak_memory(f, device):
    """Most bytes in use while f() runs, beyond those in use before it.

    CUDA: of torch's tensors; a CPU under Linux: resident memory of the process.  ValueError elsewhere.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return torch.cuda.max_memory_allocated() - before
    if device.type != "cpu" or not os.access(CLEAR_REFS, os.W_OK):
        raise ValueError(
            f"no peak memory of {device.type} on {sys.platform}; use --device cuda, or --device cpu on Linux"
        )

    def status(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    CLEAR_REFS.write_text("5")  # sets the peak, VmHWM, to what is resident now
    before = status("VmRSS")
    f()
    return status("VmHWM") - before


def in_own_process(f, *args):
    """f(*args) in a new process, in which glibc returns freed blocks to the system: reused ones would hide in a peak."""
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")  # bytes; read when a process starts
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(f, *args).result()


def memory_work(how, device, precision):
    """{name: function that builds a model, lets it work and returns it}, for images of 16 * how.grid pixels a side."""

    def images(n, side):
        return torch.rand(n, 3, side, side, device=device) * 2 - 1

    def train_vq(n, pixels=16, **settings):
        """pixels: side of an image for each row of how.grid."""
        model = build_vq(settings).to(device)
        step = vq_step(model, images(n, pixels * how.grid), device, precision)
        step(), step()  # the first makes the optimizer's moments
        return model

    def train_prior(n):
        model = GPT(how.prior).to(device)
        step = prior_step(model, n, device, precision, how.compile)
        step(), step()
        return model

    def code(way, tile):
        model, side = VQ(VQConfig()).to(device), 16 * how.grid
        codes = torch.zeros(1, *model.grid(side, side), dtype=torch.long, device=device)
        getattr(model, way)(images(1, side) if way == "encode" else codes, tile)
        return model

    def sample():
        model = GPT(how.prior).to(device).eval().requires_grad_(False)
        sampling(model, torch.zeros(1, how.text_len, dtype=torch.long, device=device), 1)()
        return model

    work = {f"train tokenizer, batch {n}": partial(train_vq, n) for n in (1, 2)}
    work["train tokenizer, stride 16"] = partial(train_vq, 1, stride=16)
    for way in ("encode", "decode"):
        work |= {way: partial(code, way, 0), f"{way} in tiles": partial(code, way, how.grid)}
    work |= {f"train prior, batch {n}": partial(train_prior, n) for n in (1, 4)}
    work["sample, guided"] = sample
    for name, n in {"ema": 2**16, "st": 2**16, "fsq": 2**16, "gumbel": 2**14}.items():  # a tiny net around them
        work[f"{name}, {n} codes"] = partial(train_vq, 1, 4, ch=4, n_res=1, quantizer=name, n_codes=n)
    return work


def measure(name, how, device, precision):
    """Do one of memory_work -> bytes of its peak, and of the model's parameters and buffers."""
    memory_work(replace(how, text_len=3, grid=2), device, precision)[name]()  # loads the libraries' code
    gc.collect()
    work, models = memory_work(how, device, precision)[name], []
    peak = peak_memory(lambda: models.append(work()), device)
    return peak, sum(w.nbytes for w in (*models[0].parameters(), *models[0].buffers()))


# --- the three tables ------------------------------------------------------------------------------------


def mask_table(how, device, precision):
    """Each mask beside causal: one layer's attention forward and backward, a training step, 32 guided codes."""
    cfg, dtype = how.prior, DTYPES[precision]
    work, shape = {}, (how.batch, cfg.n_head, cfg.text_len + cfg.n_image, cfg.n_embd // cfg.n_head)
    names = [*(name for name in MASKS if name != "bidirectional"), "dalle"]
    for name in names:
        model = build_prior(asdict(cfg) | {"mask": name}).to(device)
        sampler = build_prior(asdict(model.cfg)).to(device, torch.float32 if device.type == "cpu" else dtype)
        sampler.requires_grad_(False)
        cache = Cache(sampler, 2 * how.batch, model.layout.length)
        qkv = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
        if name in MASKS:
            mask = model.attention_masks[name]
            work[name, "attention"] = lambda qkv=qkv, mask=mask: attend(*qkv, mask).sum().backward()
        work[name, "training"] = prior_step(model, how.batch, device, precision, how.compile)
        codes = torch.zeros(2 * how.batch, 1, dtype=torch.long, device=device)

        @torch.inference_mode()
        def sample(model=sampler, cache=cache, codes=codes):
            for i in range(model.layout.n_prefix, model.layout.length, max(1, model.cfg.n_image // 32)):
                model.image_head(model.trunk(model.embed_codes(codes), i, cache))

        work[name, "sampling"] = sample
    t, kinds = medians(work, device, how.rounds), ("attention", "training", "sampling")
    print(f"{'mask':8}" + "".join(f"{kind:>22}" for kind in kinds))
    for name in names:
        cells = [(t.get((name, kind)), t["causal", kind]) for kind in kinds]
        cells = ["" if x is None else f"{1000 * x:.1f} ms, {causal / x:.2f} x" for x, causal in cells]
        print(f"{name:8}" + "".join(f"{cell:>22}" for cell in cells))


def memory_table(how, device, precision):
    """Peak memory of each of memory_work, and of a prior's training what plan.py says (without averaged weights)."""
    print(f"{'MB':28}{'peak':>8}{'weights':>9}{'plan.py':>9}")
    for name in memory_work(how, device, precision):
        figures = in_own_process(measure, name, how, device, precision)
        if name.startswith("train prior"):
            plan = PlanConfig(batch_size=int(name.split()[-1]), ema=0.0, compile=how.compile)
            figures += (sum(memory_by_part(how.prior, plan, precision).values()),)
        print(f"{name:28}" + "".join(f"{n / 1e6:{w}.0f}" for n, w in zip(figures, (8, 9, 9))), flush=True)


def speed_table(how, device, precision):
    """Training and sampling of the default prior and tokenizer."""
    n = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=DTYPES[precision]) for _ in range(2))
    cfg = how.prior
    prior, vq = GPT(cfg).to(device), VQ(VQConfig()).to(device)
    causal = GPT(cfg).to(device).eval().requires_grad_(False)
    if how.compile:
        causal.compile_step()
    masked = build_prior(asdict(cfg) | {"model": "masked"}).to(device).eval().requires_grad_(False)
    text = torch.randint(0, cfg.n_vocab, (1, cfg.text_len), device=device)
    images = torch.rand(32, 3, 64, 64, device=device) * 2 - 1
    work = {
        "matrix product": lambda: a @ b,
        "train prior": prior_step(prior, how.batch, device, precision, how.compile),
        "train tokenizer": vq_step(vq, images, device, precision),
        "encode": lambda: vq.encode(images),
    }
    for k in (1, 16):
        work[f"sample, batch {k}"] = sampling(causal, text, k)
        work[f"weights, batch {k}"] = lambda k=k: weights_alone(causal, 2 * k)
        work[f"masked, batch {k}"] = sampling(masked, text, k, steps=12)
    t = medians(work, device, how.rounds)
    peak, flops = 2 * n**3 / t["matrix product"], how.batch * training_flops(cfg)
    rate, share = how.batch * prior.layout.length / t["train prior"], flops / t["train prior"] / peak
    print(f"matrix product {n}^3     {peak / 1e12:8.2f} TFLOP/s")
    print(f"train prior, batch {how.batch:3}  {rate:8.0f} tokens/s, {share:.0%} of the matrix product")
    for k in (1, 16):
        own, floor, parallel = (t[f"{kind}, batch {k}"] / k for kind in ("sample", "weights", "masked"))
        print(
            f"sample, batch {k:2} guided {own:8.3f} s/image of {cfg.n_image} codes (float32), "
            f"{own / floor:.1f} x its weights' products alone; masked, 12 steps: {parallel:.3f} s/image"
        )
    print(f"train tokenizer        {32 / t['train tokenizer']:8.0f} images/s at 64x64, stride {vq.cfg.stride}")
    print(f"encode                 {32 / t['encode']:8.0f} images/s (float32)")


def main():
    parser = new_parser(__doc__)
    add_flags(parser, BenchConfig)
    how = pick(BenchConfig, parser.parse_args())
    device = pick_device(how.device)
    precision = pick_precision(how.precision, device)
    cfg = how.prior
    batch = "" if how.memory else f", batch {how.batch}"
    print(
        f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}, {precision}{batch}; "
        f"prior {cfg.n_layer} layers, {cfg.n_embd} wide, {cfg.text_len}+{cfg.n_image} positions"
    )
    (mask_table if how.masks else memory_table if how.memory else speed_table)(how, device, precision)


if __name__ == "__main__":
    run(main)
