"""What both training scripts share: processes, precision, optimization, averaged weights, log."""

import contextlib
import ctypes
import io
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from minit2i.checkpoint import write_file
from minit2i.parallel import DTYPES, reduce_sum
from minit2i.plot import beside, plot


@dataclass(frozen=True)
class TrainConfig:
    """How to train; each script has defaults of its own for some of these."""

    out: Annotated[str, "folder of this run"]
    recipe: Annotated[str, "a paper's choices as defaults, named below"] = ""
    resume: Annotated[bool, "continue the run in --out (or start it, if there is none yet)"] = False
    init: Annotated[str, "start from this checkpoint folder's model (a run's, or an exported one), for finetuning"] = ""
    steps: Annotated[int, "optimizer steps"] = 5000
    batch_size: Annotated[int, "pictures per step, over all processes and accumulation parts"] = 32
    accum: Annotated[int, "parts that each process makes of its share of a batch"] = 1
    lr: Annotated[float, "peak learning rate"] = 3e-4
    min_lr: Annotated[float, "learning rate at the end of the cosine, as a fraction of the peak"] = 0.05
    warmup: Annotated[int, "steps of linear warm-up"] = 200
    weight_decay: Annotated[float, "decoupled weight decay, on matrices only"] = 0.01
    beta1: Annotated[float, "AdamW"] = 0.9
    beta2: Annotated[float, "AdamW"] = 0.95
    clip: Annotated[float, "largest gradient norm; 0: no clipping"] = 1.0
    ema: Annotated[float, "decay of the averaged weights, which are the ones saved; 0: none"] = 0.0
    precision: Annotated[str, "auto picks what the device does well", ("auto", "fp32", "bf16", "fp16")] = "auto"
    compile: Annotated[bool, "torch.compile the model"] = False
    device: Annotated[str, "auto, cpu, cuda, mps"] = "auto"
    seed: Annotated[int, "seed of everything random"] = 0
    log_every: Annotated[int, "steps between lines of log.jsonl"] = 10
    eval_every: Annotated[int, "steps between evaluations, each with pictures and a curve"] = 500
    eval_size: Annotated[int, "validation pictures used"] = 256
    save_every: Annotated[int, "steps between checkpoints"] = 500

    @property
    def base(self):
        """The folder whose model this run starts from, or ''."""
        return self.init

    @property
    def named(self):
        """Fields of the model that one flag names together; flags for them win."""
        return {}


# --- processes and devices -----------------------------------------------------------------------------


def pick_device(name="auto"):
    """'auto' -> this process's GPU, Apple's, or the CPU."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(k for k in there if there[k]) if name == "auto" else name
    if not there.get(name):
        raise ValueError(
            f"device {name!r} is not known or not here; use auto, or {', '.join(k for k in there if there[k])}"
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)


class Processes:
    """This process among those that torchrun started (alone without torchrun), its device and its precision."""

    def __init__(self, device="auto", precision="auto"):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.precision = pick_precision(precision, self.device)
        if "RANK" in os.environ:
            # hours: the others wait while one process trains the text model or encodes its share
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=timedelta(hours=4))

    def __str__(self):
        return f"{self.precision} on {self.world} x {self.device.type}"

    @property
    def main(self):
        return self.rank == 0

    def say(self, text):
        if self.main:
            print(text, flush=True)

    def autocast(self):
        return autocast(self.device, self.precision)

    def total(self, tensor):
        """Sum of a tensor over the processes, without waiting for it."""
        return reduce_sum(tensor.to(self.device))

    def sum(self, values):
        """Sum each of a list of numbers over the processes -> list of floats."""
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        return self.total(torch.tensor(values, dtype=exact)).tolist()

    def gather(self, thing):
        """The same thing of every process, as a list."""
        if self.world == 1:
            return [thing]
        things = [None] * self.world
        dist.all_gather_object(things, thing)
        return things

    def barrier(self):
        if self.world > 1:
            dist.barrier()


def pick_precision(name, device):
    """'auto' -> 'bf16', 'fp16' or 'fp32' as the device does it natively."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu":
        can = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        # avx512_fp16 marks Intel: without AMX (or where a virtual machine hides it) bf16 has half float32's speed there,
        # measured 0.10 against 0.19 TFLOP/s a core
        full_rate = can.get("avx512_bf16") and not can.get("avx512_fp16")
        return "bf16" if can.get("amx_bf16") or full_rate else "fp32"
    return "fp32"


def autocast(device, precision):
    """The autocast context of a precision; nothing for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def seed_step(seed, step, rank):
    """Make all that torch draws in this step a pure function of (seed, step, rank)."""
    torch.manual_seed((seed * 1_000_003 + step) * 4099 + rank)


class Stop:
    """Whether SIGTERM or SIGINT came to any process; a second Ctrl-C stops at once.

    Several processes must agree, which makes them wait for each other: they ask each other every few steps.
    """

    def __init__(self, processes, every):
        self.processes, self.every, self.flag = processes, every, False
        for s in (signal.SIGTERM, signal.SIGINT):
            signal.signal(s, self.catch)

    def catch(self, number, frame):
        if self.flag and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.flag = True

    def asked(self, step):
        if self.processes.world == 1:
            return self.flag
        return step % self.every == 0 and self.processes.sum([self.flag])[0] > 0


def steps(cfg, p, start):
    """Steps start ... cfg.steps, one more than there are, so that the last evaluation and save are no special case.

    Yields (step, whether to evaluate, to save, to end) before each; ends early if a signal asks for it.
    """
    stop, first = Stop(p, cfg.log_every), start if cfg.resume else -1  # what a run goes on from is saved
    for step in tqdm(range(start, cfg.steps + 1), initial=start, total=cfg.steps, disable=not p.main):
        last = step == cfg.steps
        end = stop.asked(step) or last
        evaluate = last or (step % cfg.eval_every == 0 and step > start)
        save = step != first and (end or (step % cfg.save_every == 0 and step > start))
        yield step, evaluate, save, end
        if end:
            return


# --- optimization ----------------------------------------------------------------------------------------


def lr_at(step, cfg):
    """Linear warm-up, then half a cosine down to min_lr * lr at cfg.steps."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    t = min(1.0, (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup))
    return cfg.lr * (cfg.min_lr + (1 - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * t)))


def n_params(model):
    return sum(w.numel() for w in model.parameters())


def make_optimizer(model, cfg, muon=False):
    """AdamW that decays matrices and convolutions, not gains, biases and a codebook.

    muon: the matrices within transformer blocks take Muon's step instead, with the same rate and decay.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kept = [name for name, p in params.items() if p.dim() < 2 or name.endswith("codebook")]
    matrices = [name for name, p in params.items() if muon and "blocks." in name and p.dim() == 2]
    groups = [
        {"params": [p for name, p in params.items() if name not in kept + matrices], "weight_decay": cfg.weight_decay},
        {"params": [params[name] for name in kept], "weight_decay": 0.0},
    ]
    fused = next(iter(params.values())).device.type != "mps"
    adamw = torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=fused)
    return Muon(adamw, [params[name] for name in matrices], cfg) if muon else adamw


class Muon:
    """Muon for the matrices given, AdamW for the rest, as one optimizer with one state.

    A matrix moves along its momentum with all singular values made about 1 (five Newton-Schulz steps), so that rare
    directions are learned as fast as frequent ones.  Jordan et al. 2024, kellerjordan.github.io/posts/muon; scaled to
    AdamW's usual step, so that one learning rate serves both: Liu et al., arXiv:2502.16982 eq. 4.
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
    """Moving average of the parameters in float32; other state (a codebook) is taken as it is.

    The decay is min(decay, (1 + t) / (10 + t)), so that the start is forgotten soon.
    """

    def __init__(self, model, decay):
        self.decay = decay
        self.weights = {k: p.detach().float().clone() for k, p in model.named_parameters()} if decay else {}

    @torch.no_grad()
    def update(self, model, step):
        if self.decay:
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_([*self.weights.values()], [p.float() for p in model.parameters()], 1 - decay)

    def state_dict(self, model):
        """The model's state with averaged weights."""
        return {k: self.weights.get(k, v) for k, v in model.state_dict().items()}

    @contextlib.contextmanager
    def applied(self, model):
        """Within: the model holds the averaged weights and drops nothing out."""
        before = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(self.state_dict(model))
        model.eval()
        try:
            yield
        finally:
            model.load_state_dict(before)
            model.train()


def optimizer_step(model, optimizer, scaler, cfg, step):
    """Set the learning rate, unscale, clip, step -> gradient norm (a tensor, no synchronisation)."""
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step, cfg)
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or float("inf"))
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of all the parts of a sharded model
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


def check_finite(model, p, step, values={}):
    """ValueError, in all processes, if a weight or one of an evaluation's values is no finite number."""
    weights = (w.to_local() if hasattr(w, "to_local") else w for w in model.parameters())
    if p.sum([not (all(map(math.isfinite, values.values())) and all(w.isfinite().all() for w in weights))])[0]:
        raise ValueError(
            f"the training has diverged before step {step}: not all is finite; what was saved last stays, so --resume with "
            "a lower --lr or --clip, or in another --precision"
        )


# --- log -------------------------------------------------------------------------------------------------


class Log:
    """log.jsonl, one line per record, and pictures beside it.  Silent on all but the first process."""

    def __init__(self, folder, main, step):
        self.path, self.main, self.time = Path(folder, "log.jsonl"), main, time.time()
        if main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        if main and self.path.exists():  # a killed run logged past its last checkpoint: those steps come again
            kept = [r for r in read_log(self.path) if r["step"] <= step]
            write_file(self.path, "".join(json.dumps(r) + "\n" for r in kept))

    def rate(self, work):
        """Work (tokens, pictures) done per second since the last call."""
        now = time.time()
        rate, self.time = work / max(now - self.time, 1e-9), now
        return rate

    def evaluation(self, step, values, keys, sheet=None, name="samples", **text):
        """Write an evaluation's values, draw the curves of `keys` and save a sheet of pictures; its time does not count."""
        self.write(step=step, **values)
        if self.main:
            save_image(self.path.with_name("loss.png"), self.curves(keys))
        if self.main and sheet is not None:
            save_image(self.path.with_name(f"{name}-{step:06d}.png"), sheet, **text)
        self.time = time.time()

    def curves(self, keys):
        """A panel for each key that was logged, in training and in validation (val_ + key)."""
        records, panels = read_log(self.path), []
        for key in keys:
            found = {}
            for r in records:
                for k in (key, f"val_{key}"):
                    if math.isfinite(r.get(k, math.nan)):
                        found.setdefault(k, []).append((r["step"], r[k]))
            if found:
                panels.append(plot(found, f"{key}, at last {[*found.values()][-1][-1][1]:.4g}", 460, 240))
        return beside(panels)

    def write(self, **record):
        if self.main:
            with open(self.path, "a") as f:
                short = {k: round(v, 6) if isinstance(v, float) and abs(v) > 1e-3 else v for k, v in record.items()}
                f.write(json.dumps(short) + "\n")


def read_log(path):
    """The records of a log.jsonl; a line cut short by a killed process is left out."""
    records = []
    for line in Path(path).read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def save_image(path, image, **text):
    """A PNG, written atomically, with text chunks."""
    info, buffer = PngInfo(), io.BytesIO()
    for k, v in text.items():
        info.add_itxt(k, str(v))
    image.save(buffer, "PNG", pnginfo=info)
    write_file(path, buffer.getvalue())


def keep_memory():
    """Let glibc keep big blocks instead of returning them to the system at every step.

    The page faults of getting them back cost 20 to 25 % of the training time of bench.py on two cores (measured, one run each).
    """
    with contextlib.suppress(OSError, AttributeError):  # no glibc: nothing to do
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def run(main):
    """Run a script's main: what a user can mend ends with one line, not with a traceback."""
    keep_memory()
    torch.set_flush_denormal(True)  # measured: 0.5 for 0.9 s a step of gumbel at a low temperature, the same loss
    try:
        main()
    except (ValueError, OSError) as e:
        if os.environ.get("MINIT2I_TRACEBACK"):
            raise
        sys.exit(f"error: {e}")
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
