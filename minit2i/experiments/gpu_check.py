"""What a GPU has to say: one line per check, ok or FAIL, with figures.

    python -m minit2i.experiments.gpu_check                   at most 7 minutes (--budget), the most important first
    python -m minit2i.experiments.gpu_check --only "mfu|half" some checks
    python -m minit2i.experiments.gpu_check --tiny            a minute, on a CPU too: does the script work?

Nothing stops at a failure; every check has its own time limit, and none starts after the budget is spent.  Errors are
||got - expected|| / ||expected||; expected values come from float32 with dense masks.
"""

import contextlib
import functools
import gc
import re
import signal
import statistics
import time
import warnings
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F

from minit2i import gpt
from minit2i.attention import MASKS, AttentionMask, Layout, attend, visible
from minit2i.config import Settings, Group, at_least, pick
from minit2i.experiments.bench import prior_step, random_batch, seconds, vq_step
from minit2i.experiments.plan import training_flops
from minit2i.experiments.stability import TOY, stripes
from minit2i.flags import add_flags, new_parser
from minit2i.fp16 import make_scaler
from minit2i.gpt import build_prior
from minit2i.parallel import compile_blocks
from minit2i.sample import SampleConfig, Sampler
from minit2i.train import DTYPES, Processes, TrainConfig, autocast
from minit2i.train import make_optimizer, n_params, optimizer_step, pick_device, set_up
from minit2i.vq import build_vq

TOLERANCE = {"bf16": 2e-2, "fp16": 4e-3, "fp32": 1e-3}
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40": 181e12, "4090": 165e12, "3090": 71e12}  # bf16, dense
TRICKS = dict(norm="pb_layernorm", pb_relax=True, sandwich=True, embed_grad=0.1)  # CogView's


@dataclass(frozen=True)
class CheckConfig(Settings):
    """What to check."""

    group = Group("Checks")
    tiny: Annotated[bool, "tiny sizes"] = False
    device: Annotated[str, "auto, cpu or cuda"] = "auto"
    only: Annotated[str, "a regular expression: checks whose name it finds"] = ""
    budget: Annotated[float, "seconds in all", at_least(1)] = 420.0


class Late(BaseException):
    """A check took too long; not an Exception, so nothing on the way catches it."""


class Machine:
    """The device and what was measured of it; `tiny` chooses small sizes."""

    def __init__(self, cfg):
        self.tiny, self.device = cfg.tiny, pick_device(cfg.device)
        self.cuda = self.device.type == "cuda"
        self.bandwidth = self.product = None  # bytes/s, bf16 FLOP/s, see `machine`

    def seconds(self, f, times=5, warm=2):
        """Median wall time of f, including the device's work."""
        taken = [seconds(f, self.device) for _ in range(warm + (1 if self.tiny else times))]
        return statistics.median(taken[warm:])

    def peak(self):
        """Nominal bf16 FLOP/s of this device, or what a large product reached."""
        name = torch.cuda.get_device_name() if self.cuda else ""
        return next((flops for key, flops in PEAKS.items() if key in name), self.product or 1e12)

    def free(self):
        """Drop what the last check held, and the TF32 that training chose."""
        torch.set_float32_matmul_precision("highest")
        gc.collect()
        torch._dynamo.reset()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def memory(self):
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if self.cuda else "no GPU"

    def prior(self, side=16, text=32, **settings):
        """Settings of a prior with a square grid; tiny: at most 4x4 codes and two narrow layers."""
        if self.tiny:
            settings |= {"n_embd": 64, "n_head": 2, "n_layer": min(2, settings.get("n_layer", 2))}
            side, text = min(side, 4), min(text, 8)
        return dict(n_vocab=200, n_codes=512, text_len=text, grid_h=side, grid_w=side) | settings


def error(got, expected):
    """Relative error of tensors (norm of the difference over the norm): got, expected -> float, Inf for NaN."""
    got, expected = (torch.cat([x.detach().float().flatten() for x in xs]) for xs in (got, expected))
    e = float((got - expected).norm() / expected.norm())
    return e if e == e else float("inf")  # NaN: nothing was expected, or something is not finite


def first_line(e):
    """An exception's type and the first line of its message."""
    return f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:160]}"


CHECKS = {}  # name -> (function, seconds it may take), the most important first


def check(limit):
    """Register a function (Machine) that yields (name, ok, figures)."""
    return lambda f: CHECKS.setdefault(f.__name__, (f, limit))[0]


# --- the machine -----------------------------------------------------------------------------------------


@check(40)
def machine(m):
    """Name, precision, rates of large products and copies."""
    name = torch.cuda.get_device_name() if m.cuda else "CPU"
    yield "machine", m.cuda or m.tiny, f"{name}, torch {torch.__version__}, {Processes(m.device.type)}"
    n, rates = 256 if m.tiny else 8192, {}
    for kind in ("fp32", "fp16", "bf16"):
        a, b = (torch.randn(n, n, device=m.device, dtype=DTYPES[kind]) for _ in range(2))
        rates[kind] = m.product = 2 * n**3 / m.seconds(lambda a=a, b=b: a @ b)
    a = torch.empty(2**20 if m.tiny else 2**30, dtype=torch.uint8, device=m.device)
    b = torch.empty_like(a)
    m.bandwidth = 2 * a.numel() / m.seconds(lambda: b.copy_(a))
    products = ", ".join(f"{k} {v / 1e12:.0f}" for k, v in rates.items())
    yield "machine, rates", True, f"products {products} TFLOP/s, copies {m.bandwidth / 1e9:.0f} GB/s"


# --- attention -------------------------------------------------------------------------------------------


def attention_errors(m, name, layout, kind, heads, size, batch=2, alpha=None, pads=False):
    """attend, forward and backward, against float32 SDPA with the dense mask -> errors of output and gradients.

    pads: the end of the prefix is hidden, more of it in each sample.
    """
    mask = AttentionMask(name, layout).to(m.device)
    torch.manual_seed(0)
    shape = batch, heads, layout.length, size
    plain = [torch.randn(shape, device=m.device).to(DTYPES[kind]) for _ in range(4)]
    q, k, v = (x.clone().requires_grad_() for x in plain[:3])
    at = torch.arange(layout.length, device=m.device)
    words = layout.n_prefix - 1 - torch.arange(batch, device=m.device)[:, None]
    seen = (at < words) | (at >= layout.n_prefix) if pads else None  # (B, L)
    y = attend(q, k, v, mask, alpha=alpha, seen=seen)
    y.backward(plain[3])
    q32, k32, v32 = (x.float().requires_grad_() for x in plain[:3])
    y32 = F.scaled_dot_product_attention(q32, k32, v32, attn_mask=visible(mask.dense, seen))
    y32.backward(plain[3].float())
    return error([y], [y32]), error([q.grad, k.grad, v.grad], [q32.grad, k32.grad, v32.grad])


@check(200)
def masks(m):
    """Every mask at the default sizes (288 positions, no multiple of 128), also with hidden pads; other types and head
    sizes."""
    layout = Layout(8, 4, 4) if m.tiny else Layout(32, 16, 16)
    cases = [(name, "bf16", 8, 32, None, pads) for pads in (False, True) for name in MASKS]
    cases += [("row", "fp16", 8, 32, None, False), ("conv", "fp32", 8, 32, None, False)]
    cases += [("column", "fp16", 8, 32, 32, False)]
    cases += [("row", "bf16", heads, size, None, False) for heads, size in ((2, 128), (16, 16), (4, 34), (8, 8))]
    for name, kind, heads, size, alpha, pads in cases:  # alpha: PB-Relax's
        label, start = f"mask {name}, {kind}, head size {size}" + ", PB-Relax" * bool(alpha), time.monotonic()
        label += ", hidden pads" * pads
        try:
            out, grad = attention_errors(m, name, layout, kind, heads, size, alpha=alpha, pads=pads)
            figures = f"error {out:.1e}, gradients {grad:.1e}; {time.monotonic() - start:.0f} s with compiling"
            yield label, max(out, grad) < TOLERANCE[kind], figures
        except Exception as e:
            yield label, False, first_line(e)


@check(150)
def training(m):
    """A small prior under several masks, eager and compiled: loss and gradients against float32 with dense masks."""
    cases = ("causal", "bf16", 1), ("causal", "fp16", 0), ("dalle", "bf16", 1), ("dalle", "fp16", 0)
    for mask, kind, compiled in (*cases, ("window", "bf16", 0), ("row", "fp16", 0), ("prefix", "bf16", 0)):
        torch.manual_seed(0)
        model = build_prior(m.prior(n_layer=4, mask=mask)).to(m.device)
        batch = random_batch(model.cfg, 2, m.device)
        with dense_attention():
            loss, grads = loss_and_gradients(m, model, batch, "fp32")
        for how in ("eager", "compiled")[: 1 + compiled]:
            start, counters = time.monotonic(), torch._dynamo.utils.counters
            counters.clear()
            try:
                if how == "compiled":
                    compile_blocks(model, DTYPES[kind], m.device)
                got, own = loss_and_gradients(m, model, batch, kind)
                e = error(own, grads)
                figures = f"loss {got:.4f} ({loss:.4f}), gradients {e:.1e}; {time.monotonic() - start:.0f} s"
                if how == "compiled":
                    graphs, breaks = counters["stats"].get("unique_graphs", 0), sum(counters["graph_break"].values())
                    figures += f", {graphs} graphs, {breaks} graph breaks"
                yield f"training {mask}, {kind}, {how}", abs(got - loss) < 0.02 and e < 3 * TOLERANCE[kind], figures
            except Exception as e:
                yield f"training {mask}, {kind}, {how}", False, first_line(e)


@contextlib.contextmanager
def dense_attention():
    """Context in which every mask is a dense one."""

    def dense(q, k, v, mask, start=0, alpha=None, seen=None):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense[start : start + q.shape[2], : k.shape[2]])

    before, gpt.attend = gpt.attend, dense
    try:
        yield
    finally:
        gpt.attend = before


def loss_and_gradients(m, model, batch, precision):
    """A batch's loss and its gradients in a precision -> float, [tensor]."""
    model.zero_grad(set_to_none=True)
    scale = 1024.0 if precision == "fp16" else 1.0
    with autocast(m.device, precision):
        sums = model(batch)
    loss = sums["text"] / batch["text"].numel() + sums["image"] / batch["codes"].numel()
    (loss * scale).backward()
    return float(loss), [w.grad / scale for w in model.parameters() if w.grad is not None]


# --- sampling --------------------------------------------------------------------------------------------


def sampled(model, n, cfg_scale=2.5, share=1.0):
    """Codes (n, N) of n images of one prompt; only the last `share` of them is sampled, the rest is given."""
    text = torch.zeros(1, model.cfg.text_len, dtype=torch.long, device=model.embedding.weight.device)
    sampler = Sampler(SampleConfig(n=n, cfg_scale=cfg_scale), range(n), text.device)
    known = torch.full((n, model.cfg.n_image), -1, device=text.device)
    known[:, : round((1 - share) * model.cfg.n_image)] = 0
    return model.generate({"text": text}, text[0], sampler, known)


def graph_skips():
    """How often the compiler went without CUDA graphs."""
    return torch._dynamo.utils.counters["inductor"].get("cudagraph_skips", 0)


@check(60)
def sampling_same(m):
    """float32: codes sampled on the GPU, also compiled, equal the CPU's."""
    for mask in ("causal", "dalle"):
        torch.manual_seed(0)
        model = build_prior(m.prior(8, 8, n_layer=3, n_embd=128, n_head=4, mask=mask)).eval().requires_grad_(False)
        cpu = sampled(model, 2)
        model = model.to(m.device)
        eager = sampled(model, 2).cpu()
        torch._dynamo.utils.counters.clear()
        model.compile_step()
        compiled, again = sampled(model, 2).cpu(), sampled(model, 2).cpu()
        same = ", ".join(f"{float((v == cpu).float().mean()):.1%}" for v in (eager, compiled, again))
        figures = f"as on the CPU: {same} (eager, compiled, again); CUDA graphs skipped {graph_skips()}"
        yield f"sampling {mask}, the same codes", eager.equal(compiled) and eager.equal(again), figures


SMALL, LARGE = dict(n_layer=12, n_head=12, n_embd=768), dict(n_layer=24, n_head=16, n_embd=2048)


@check(100)
def sampling_speed(m):
    """Codes/s of priors in bf16 without guidance, and their share of the memory bandwidth."""
    for name, shape, how, batch, share in (
        ("98 M", SMALL, "compiled", 1, 1.0),
        ("98 M", SMALL, "eager, last quarter", 1, 0.25),
        ("98 M", SMALL, "compiled", 16, 1.0),
        ("1.2 B", LARGE, "compiled", 1, 1.0),
    ):
        m.free()
        torch.manual_seed(0)
        with m.device:
            model = build_prior(m.prior(32, 32, **shape) | {"n_codes": 512 if m.tiny else 8192})
        model = model.to(m.device, torch.bfloat16).eval().requires_grad_(False)
        read = 2 * (n_params(model.blocks) + model.image_head.weight.numel())  # bytes per code
        torch._dynamo.utils.counters.clear()
        if how == "compiled":
            model.compile_step()
        n, s = share * model.cfg.n_image, m.seconds(functools.partial(sampled, model, batch, 1.0, share), 2, warm=1)
        figures = f"{batch * n / s:,.0f} codes/s; weights read at {read * n / s / (m.bandwidth or 1e12):.1%} of the "
        figures += f"bandwidth, CUDA graphs skipped {graph_skips()}"
        yield f"sampling {name}, {how}, batch {batch}", how != "compiled" or not (m.cuda and graph_skips()), figures


# --- training steps --------------------------------------------------------------------------------------


@check(130)
def mfu(m):
    """Model FLOPs utilisation of whole training steps of 1,088 positions, and memory; float16 with CogView's tricks."""
    for name, shape, batch, kind, compiled in (
        ("98 M", SMALL, 32, "bf16", True),
        ("1.2 B", LARGE, 12, "bf16", True),
        ("98 M", SMALL, 32, "fp16", True),
        ("1.2 B", LARGE, 12, "fp16", True),
        ("98 M", SMALL, 32, "bf16", False),
    ):
        m.free()
        set_up(m.device)
        label = f"mfu {name}, {kind}{', tricks' * (kind == 'fp16')}, {'compiled' if compiled else 'eager'}"
        try:
            yield label, True, utilisation(m, shape | (TRICKS if kind == "fp16" else {}), batch, kind, compiled)
        except Exception as e:  # the memory of a smaller card
            yield label, False, first_line(e)


def utilisation(m, shape, batch, kind, compiled):
    """Figures of a prior's training steps."""
    start, batch = time.monotonic(), 2 if m.tiny else batch
    with m.device:  # a CPU would take half a minute to initialise the large one
        model = build_prior(m.prior(32, 64, **shape) | {"n_codes": 512 if m.tiny else 8192}).to(m.device)
    step = prior_step(model, batch, m.device, kind, compiled)
    step(), step()
    ready = time.monotonic() - start
    s, flops = m.seconds(step, times=6, warm=1), batch * training_flops(model.cfg)
    rate, share = batch * model.layout.length / s, flops / s / (m.product or m.peak())
    return (
        f"{n_params(model) / 1e6:,.0f} M, batch {batch}: {1e3 * s:.1f} ms, {rate:,.0f} tokens/s, "
        f"MFU {flops / s / m.peak():.1%} ({share:.1%} of the product), {m.memory()}, first steps {ready:.0f} s"
    )


@check(70)
def tokenizers(m):
    """Images/s of training steps at 128 pixels, stride 8, also channels_last."""
    size, batch = (32, 2) if m.tiny else (128, 32)
    images = torch.rand(batch, 3, size, size, device=m.device) * 2 - 1
    small = dict(stride=8, ch=4, n_res=1, n_codes=64) if m.tiny else dict(stride=8, n_codes=1000)
    for name, quantizer in (("vqvae", "ema"), ("dvae", "gumbel"), ("vqgan", "ema"), ("movq", "ema"), ("vqvae", "fsq")):
        try:
            taken = []
            for form in (torch.contiguous_format, torch.channels_last):
                m.free()
                set_up(m.device)
                vq = build_vq(small | dict(backbone=name, quantizer=quantizer)).to(m.device).to(memory_format=form)
                vq.image_format = lambda device, form=form: form
                taken.append(m.seconds(vq_step(vq, images, m.device, "bf16"), times=3))
            figures = "{:,.0f} images/s, channels_last {:,.0f}".format(*(batch / s for s in taken))
            yield f"tokenizer {name}, {quantizer}", True, f"{figures}; {m.memory()}"
        except Exception as e:
            yield f"tokenizer {name}, {quantizer}", False, first_line(e)


@dataclass(frozen=True)
class StepConfig(TrainConfig):
    """How `script_step` trains."""

    block_scale: bool = False


def script_step(m, settings, precision, **how):
    """-> a function (step, batch) that trains as train_prior.py does, with its scaler, and returns the image loss."""
    torch.manual_seed(0)
    cfg = StepConfig(out="", lr=5e-4, warmup=10, **how)
    procs, model = Processes(m.device.type, precision), build_prior(settings).to(m.device)
    scaler, optimizer = make_scaler(model, cfg, procs), make_optimizer(model, cfg)

    def step(k, batch):
        batch = {name: x.to(m.device) for name, x in batch.items()}
        with procs.autocast():
            sums = model(batch, train=True)
        image = sums["image"] / batch["codes"].numel()
        scaler.scale(0.875 * image + 0.125 * sums["text"] / batch["text"].numel()).backward()
        optimizer_step(model, optimizer, scaler, cfg, k)
        return image.detach()

    return step


@check(110)
def half(m):
    """24 layers learn stripes in bf16, in fp16 with a loss scale, with CogView's tricks, and with block scales."""
    steps, layers, width = (3, 3, 32) if m.tiny else (300, 24, 512)
    toy = TOY | dict(norm="layernorm", n_layer=layers, n_head=width // 32, n_embd=width)
    for name, kind, tricks, block_scale in (
        ("bf16", "bf16", {}, False),
        ("fp16, loss scale", "fp16", {}, False),
        ("fp16, loss scale, CogView's tricks", "fp16", TRICKS, False),
        ("fp16, block scales, CogView's tricks", "fp16", TRICKS | {"fp32_logits": True}, True),
    ):
        m.free()
        step, start = script_step(m, toy | tricks, kind, block_scale=block_scale), time.monotonic()
        losses = torch.stack([step(k, stripes(k, 32)) for k in range(steps)]).tolist()
        s, last = (time.monotonic() - start) / steps, statistics.mean(losses[-max(1, steps // 15) :])
        ok = all(x == x for x in losses) and (last < losses[0] or m.tiny)
        yield f"half: {name}", ok, f"loss {losses[0]:.3f} -> {last:.3f}, {1e3 * s:.1f} ms per step, {m.memory()}"


# --- all of them -----------------------------------------------------------------------------------------


def run_check(m, name, left):
    """Run one check and print its lines -> number of lines, number of failures."""
    function, limit = CHECKS[name]
    start, done, failed = time.monotonic(), 0, 0
    try:
        signal.setitimer(signal.ITIMER_REAL, min(limit, left))
        for label, ok, figures in function(m):
            print(f"{'ok' if ok else 'FAIL':4} {label:44} {figures}", flush=True)
            done, failed = done + 1, failed + (not ok)
    except Late:
        print(f"LATE {name:44} stopped after {time.monotonic() - start:.0f} s", flush=True)
        failed += 1
    except Exception as e:
        print(f"FAIL {name:44} {first_line(e)}", flush=True)
        failed += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        with contextlib.suppress(Exception):
            m.free()
    return done, failed


def late(*_):
    """Signal handler: raise Late."""
    raise Late


def main():
    parser = new_parser(__doc__)
    add_flags(parser, CheckConfig)
    cfg, started = pick(CheckConfig, parser.parse_args()), time.monotonic()
    signal.signal(signal.SIGALRM, late)
    warnings.filterwarnings("ignore")
    if cfg.tiny:  # Dynamo alone will do
        compile_fully = torch.compile
        torch.compile = lambda f, dynamic=None, **_: compile_fully(f, dynamic=dynamic, backend="eager")
    m, done, failed = Machine(cfg), 0, 0
    print(f"{'ok':4} {'check':44} figures", flush=True)
    for name in CHECKS:
        left = cfg.budget - (time.monotonic() - started)
        if not re.search(cfg.only, name):
            continue
        if left < 5:
            print(f"skip {name:44} the budget of {cfg.budget:.0f} s is spent", flush=True)
            continue
        lines, bad = run_check(m, name, left)
        done, failed = done + lines, failed + bad
    print(f"{done} lines, {failed} failed, {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
