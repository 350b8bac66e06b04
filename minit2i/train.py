"""Shared by both training scripts: processes, precision, the step loop, optimizers, averaged weights, the log."""

import contextlib
import ctypes
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
from tqdm import tqdm

from minit2i.checkpoint import read_config, saved_step, write_file
from minit2i.collectives import all_reduce_sum, connect
from minit2i.config import RARE, Group, Settings, at_least, between
from minit2i.plot import plot_log, read_log, save_image

EVAL_SIZE = 256  # validation images of an evaluation
MAX_SEED = 2**31 - 1  # seed_step's product stays below 2**63
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Settings of a training run; each script has defaults of its own for some of them."""

    group = "Optimizer"

    out: Annotated[str, "folder of this run"]
    recipe: Annotated[str, "a paper's settings as defaults; see below"] = ""
    resume: Annotated[bool, "continue the run in --out, or start it if there is none yet"] = False
    restart_schedule: Annotated[bool, "with --resume: warm-up and cosine start anew", Group("Run"), RARE] = False
    init: Annotated[str, "start from the model in this checkpoint folder (finetuning)", Group("Run")] = ""
    device: Annotated[str, "auto, cpu, cuda or mps", Group("Run")] = "auto"
    seed: Annotated[int, "seed of everything random", Group("Run"), between(0, MAX_SEED)] = 0
    log_every: Annotated[int, "steps between lines of log.jsonl", Group("Run"), at_least(1)] = 10
    eval_every: Annotated[int, "steps between evaluations, each with a checkpoint", Group("Run"), at_least(1)] = 500
    dry_run: Annotated[bool, "print the resolved settings and the model's size, and stop", Group("Run")] = False
    steps: Annotated[int, "optimizer steps", at_least(0)] = 5000
    batch_size: Annotated[int, "images per step, over all processes and micro-batches", at_least(1)] = 32
    lr: Annotated[float, "peak learning rate", at_least(0)] = 3e-4
    min_lr: Annotated[float, "final learning rate of the cosine, as a fraction of the peak", at_least(0)] = 0.05
    warmup: Annotated[int, "steps of linear warm-up", at_least(0)] = 200
    weight_decay: Annotated[float, "decoupled weight decay of matrices and convolutions", at_least(0)] = 0.01
    beta1: Annotated[float, "AdamW's decay of the first moment", between(0, 0.999999)] = 0.9
    beta2: Annotated[float, "AdamW's decay of the second moment", between(0, 0.999999)] = 0.95
    clip: Annotated[float, "largest gradient norm; 0: no clipping", at_least(0)] = 1.0
    ema: Annotated[float, "decay of the averaged weights, which are what is saved; 0: none", between(0, 1)] = 0.0
    accum: Annotated[int, "micro-batches per step and process", Group("Scale"), at_least(1)] = 1
    compile: Annotated[bool, "torch.compile the model", Group("Scale")] = False
    precision: Annotated[str, "auto: the fastest native one", Group("Half precision"), ("auto", *DTYPES)] = "auto"
    schedule_start: int = 0  # the step at which warm-up and cosine began, see --restart_schedule


# --- processes and devices -----------------------------------------------------------------------------


def pick_device(name="auto"):
    """'auto' -> this process's CUDA GPU, Apple's GPU, or the CPU.  ValueError if the device is not available."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(k for k in available if available[k]) if name == "auto" else name
    if not available.get(name):
        here = ", ".join(k for k in available if available[k])
        raise ValueError(f"device {name!r} is not known or not here; use auto, or {here}")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)


def pick_precision(name, device):
    """'auto' -> 'bf16', 'fp16' or 'fp32', whichever is the fastest that the device does natively."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu":
        can = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        # avx512_fp16 marks Intel: without AMX (or where a virtual machine hides it) bf16 has half float32's speed
        # there, measured 0.10 against 0.19 TFLOP/s per core
        full_rate = can.get("avx512_bf16") and not can.get("avx512_fp16")
        return "bf16" if can.get("amx_bf16") or full_rate else "fp32"
    return "fp32"


def autocast(device, precision):
    """The autocast context of a precision; a null context for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def set_up(device):
    """What training takes on each device.  Optimizers are fused and copies do not wait, wherever they can.

    CUDA: TF32 where a product is in float32 (float32 output layers, --precision fp32; vq.nearest_code stays exact), and
    the fastest of cuDNN's algorithms for each convolution.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True


class Processes:
    """This process among those that torchrun started (alone without torchrun), its device and its precision."""

    def __init__(self, device="auto", precision="auto"):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main, self.device = self.rank == 0, pick_device(device)
        set_up(self.device)
        self.precision = pick_precision(precision, self.device)
        if "RANK" in os.environ:
            connect(self.device)

    def __str__(self):
        return f"{self.precision} on {self.world} x {self.device.type}"

    def say(self, text):
        if self.main:
            print(text, flush=True)

    def autocast(self):
        return autocast(self.device, self.precision)

    def all_reduce(self, tensor):
        """Sum of a tensor over the processes, without waiting for it."""
        return all_reduce_sum(tensor.to(self.device))

    def sum(self, values):
        """Sum each of a list of numbers over the processes -> list of floats."""
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        return self.all_reduce(torch.tensor(values, dtype=exact)).tolist()


# --- the step loop -------------------------------------------------------------------------------------


def seed_step(seed, step, rank):
    """Make torch's random numbers in this step a pure function of (seed, step, rank)."""
    torch.manual_seed((seed * 1_000_003 + step) * 4099 + rank)


class Stop:
    """Whether any process got SIGTERM or SIGINT; a second Ctrl-C stops at once.

    Several processes must agree, which makes them wait for each other: they ask each other every few steps.
    """

    def __init__(self, procs, every):
        self.procs, self.every, self.flag = procs, every, False
        for s in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # not the main thread: signals are someone else's
                signal.signal(s, self.catch)

    def catch(self, number, frame):
        if self.flag and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.flag = True

    def asked(self, step):
        if self.procs.world == 1:
            return self.flag
        return step % self.every == 0 and self.procs.sum([self.flag])[0] > 0


def steps(cfg, procs, start):
    """Steps start ... cfg.steps, one more than are trained: the last evaluation and save are no special case.

    Yields (step, evaluate, save, end) before each step.  Evaluations are followed by a save; a signal ends early.
    """
    stop, saved = Stop(procs, cfg.log_every), start if cfg.resume else -1  # a resumed run's first step is on disk
    for step in tqdm(range(start, cfg.steps + 1), initial=start, total=cfg.steps, disable=not procs.main):
        last = step == cfg.steps
        end = stop.asked(step) or last
        evaluate = last or (step % cfg.eval_every == 0 and step > start)
        yield step, evaluate, step != saved and (end or evaluate), end
        if end:
            return


# --- optimization --------------------------------------------------------------------------------------


def lr_at(step, cfg):
    """Linear warm-up from cfg.schedule_start, then half a cosine down to min_lr * lr at cfg.steps."""
    step, steps = step - cfg.schedule_start, cfg.steps - cfg.schedule_start
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    t = min(1.0, (step - cfg.warmup) / max(1, steps - cfg.warmup))
    return cfg.lr * (cfg.min_lr + (1 - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * t)))


def resumed_schedule(cfg, procs):
    """A resumed run's cfg with --restart_schedule applied: as schedule_start, which config.json keeps from now on.

    Says how the learning rate changes, by that or by another --steps, --lr or --warmup.
    """
    if not cfg.resume:
        return cfg
    config, step = read_config(cfg.out), saved_step(cfg.out)
    before = replace(cfg, **{k: config["train"].get(k, getattr(cfg, k)) for k in ("lr", "min_lr", "warmup", "steps")})
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # torchrun's own restart of the same command
    if cfg.restart_schedule and not again:
        cfg = replace(cfg, schedule_start=step)
        config["train"] |= {"schedule_start": step}
        if procs.main:
            write_file(Path(cfg.out, "config.json"), json.dumps(config, indent=1) + "\n")
    was, now = lr_at(step, before), lr_at(step, cfg)
    if cfg.steps < step:
        procs.say(f"{cfg.out} is at step {step} already: --steps {cfg.steps} leaves nothing to do")
    elif not math.isclose(was, now):
        procs.say(
            f"the learning rate goes on at {now:.3g}, not at {was:.3g}: warm-up and cosine take steps "
            f"{cfg.schedule_start} to {cfg.steps}, before {before.schedule_start} to {before.steps}"
            + ("" if cfg.schedule_start == step else "; --restart_schedule would start them here")
        )
    return replace(cfg, restart_schedule=False)


def n_params(model):
    """Number of parameters."""
    return sum(w.numel() for w in model.parameters())


def make_optimizer(model, cfg, muon=False):
    """AdamW; weight decay on matrices and convolutions, not on gains, biases and codebooks.

    muon: the matrices of transformer blocks take Muon's step instead, with the same rate and decay.
    """
    params = {name: w for name, w in model.named_parameters() if w.requires_grad}
    kept = [name for name, w in params.items() if w.dim() < 2 or name.endswith("codebook")]
    matrices = [name for name, w in params.items() if muon and "blocks." in name and w.dim() == 2]
    groups = [
        {"params": [w for name, w in params.items() if name not in kept + matrices], "weight_decay": cfg.weight_decay},
        {"params": [params[name] for name in kept], "weight_decay": 0.0},
    ]
    fused = next(iter(params.values())).device.type != "mps"
    adamw = torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=fused)
    return Muon(adamw, [params[name] for name in matrices], cfg) if muon else adamw


class Muon:
    """Muon for the given matrices and AdamW for the rest, behind one optimizer's interface, with one state.

    Muon's update is the momentum with all singular values set to about 1 (five Newton-Schulz steps): rare directions
    are learned as fast as frequent ones.  Jordan et al. 2024, kellerjordan.github.io/posts/muon; scaled to AdamW's
    usual step, which lets one learning rate serve both: Liu et al., arXiv:2502.16982 eq. 4.
    """

    def __init__(self, adamw, matrices, cfg):
        scale = dict(momentum=0.95, adjust_lr_fn="match_rms_adamw")
        muon = torch.optim.Muon(matrices, lr=cfg.lr, weight_decay=cfg.weight_decay, **scale)
        self.both, self.state = (adamw, muon), adamw.state
        muon.state = adamw.state
        self.param_groups = adamw.param_groups + muon.param_groups

    def step(self):
        for optimizer in self.both:
            optimizer.step()

    def zero_grad(self, set_to_none=True):
        for optimizer in self.both:
            optimizer.zero_grad(set_to_none)


class EMA:
    """Exponential moving average of the parameters in float32; buffers (a codebook) are copied.

    The decay is min(decay, (1 + t) / (10 + t)): the random start is soon forgotten.
    """

    def __init__(self, model, decay):
        self.decay = decay
        self.weights = {k: w.detach().float().clone() for k, w in model.named_parameters()} if decay else {}

    @torch.no_grad()
    def update(self, model, step):
        if self.decay:
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_([*self.weights.values()], [w.float() for w in model.parameters()], 1 - decay)

    def state_dict(self, model):
        """The model's state dict with averaged weights."""
        return {k: self.weights.get(k, v) for k, v in model.state_dict().items()}

    @contextlib.contextmanager
    def applied(self, model):
        """Context in which the model holds the averaged weights, in eval mode."""
        before = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(self.state_dict(model))
        model.eval()
        try:
            yield
        finally:
            model.load_state_dict(before)
            model.train()


def optimizer_step(model, optimizer, scaler, cfg, step):
    """Set the learning rate, unscale, clip, step -> gradient norm (a tensor; no synchronisation)."""
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step, cfg)
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or float("inf"))
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # over all shards
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


def check_finite(model, procs, step, values={}):
    """ValueError, in all processes, if a weight (or codebook) or one of an evaluation's values is NaN or Inf."""
    weights = (w.to_local() if hasattr(w, "to_local") else w for w in model.state_dict().values())
    if procs.sum([not (all(map(math.isfinite, values.values())) and all(w.isfinite().all() for w in weights))])[0]:
        raise ValueError(
            f"the training has diverged before step {step}: weights or losses are NaN or Inf; the last checkpoint "
            "stays, if there is one: --resume with a lower --lr or --clip, or in another --precision"
        )


def check_loss(loss, model, procs, step):
    """ValueError if a logged loss (of all processes) is NaN or Inf, and weights too.

    In float16 a loss alone may be: its scaler then skips the step.
    """
    if not math.isfinite(loss):
        check_finite(model, procs, step)


# --- log -----------------------------------------------------------------------------------------------


class Log:
    """log.jsonl, one line per record, and images beside it.  Only the first process writes."""

    def __init__(self, folder, main, step):
        self.path, self.main, self.time = Path(folder, "log.jsonl"), main, time.time()
        if main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        if main and self.path.exists():  # a killed run logged past its last checkpoint: those steps come again
            kept = [r for r in read_log(self.path) if r["step"] <= step]
            write_file(self.path, "".join(json.dumps(r) + "\n" for r in kept))

    def rate(self, work):
        """Work (tokens, images) done per second since the last call."""
        now = time.time()
        rate, self.time = work / max(now - self.time, 1e-9), now
        return rate

    def write(self, **record):
        if self.main:
            with open(self.path, "a") as f:
                short = {k: round(v, 6) if isinstance(v, float) and abs(v) > 1e-3 else v for k, v in record.items()}
                f.write(json.dumps(short) + "\n")

    def evaluation(self, step, values, keys, grid=None, name="samples", **text):
        """Write an evaluation's values, plot the curves of `keys`, save a grid of images; its time does not count."""
        self.write(step=step, **values)
        if self.main:
            save_image(self.path.with_name("loss.png"), plot_log(self.path, keys))
        if self.main and grid is not None:
            save_image(self.path.with_name(f"{name}-{step:06d}.png"), grid, **text)
        self.time = time.time()


# --- scripts -------------------------------------------------------------------------------------------


def keep_memory():
    """Let glibc keep large blocks instead of returning them to the system at every step.

    Getting them back (page faults) costs 20 to 25 % of the training time of bench.py on two cores (measured, one run).
    """
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def out_of_memory(error):
    """Whether an exception says that a GPU's or the computer's memory is full."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def run(main):
    """Run a script's main; user errors print one line, no traceback."""
    keep_memory()
    torch.set_flush_denormal(True)  # measured: 0.5 for 0.9 s a step of gumbel at a low temperature, the same loss
    try:
        main()
    except (ValueError, OSError, MemoryError, RuntimeError) as e:
        if os.environ.get("MINIT2I_TRACEBACK") or isinstance(e, RuntimeError) and not out_of_memory(e):
            raise
        if out_of_memory(e):
            e = f"not enough memory ({str(e).splitlines()[0]}); use a smaller batch, image or model"
        sys.exit(f"error: {e}")
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
