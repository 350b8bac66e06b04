"""Replicas and shards: equal to one process, to rounding; what is sent, and when."""

from collections import Counter
from copy import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from processes import fork
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from minit2i.fp16 import make_scaler
from minit2i.gpt import GPT, GPTConfig
from minit2i.parallel import gather, parallelize, sync_gradients, unsharded
from minit2i.train import EMA, Processes, make_optimizer, optimizer_step
from train_prior import PriorTrainConfig

CFG = GPTConfig(n_layer=2, n_head=2, n_embd=32, text_len=8, n_vocab=40, n_codes=33, grid_h=2, grid_w=3)
TRAIN = PriorTrainConfig(out="", lr=1e-2, warmup=2, steps=100, ema=0.9, clip=1.0, accum=2)


def data(step):
    g = torch.Generator().manual_seed(step)
    return torch.randint(0, 40, (8, 8), generator=g), torch.randint(0, 33, (8, 6), generator=g)


class Run:
    """A few steps of train_prior's loop on 8 pictures a step."""

    def __init__(self, cfg=TRAIN, precision="fp32", init_scale=2.0**16):
        torch.manual_seed(0)
        self.cfg, self.p = cfg, Processes("cpu") if not dist.is_initialized() else copy(Run.p)
        self.p.precision, Run.p = precision, self.p
        self.model = GPT(CFG)
        self.scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16", init_scale=init_scale)
        if cfg.block_scale:
            self.scaler = make_scaler(self.model, cfg, self.p)
        self.forward = parallelize(self.model, self.p, cfg, self.scaler)
        self.optimizer = make_optimizer(self.model, cfg, cfg.optimizer == "muon")
        self.ema, self.step = EMA(self.model, cfg.ema), 0

    def backward(self, batch):
        text, codes = (t.chunk(self.p.world)[self.p.rank] for t in batch)
        total = torch.zeros(2)
        for k in range(self.cfg.accum):
            sync_gradients(self.forward, k == self.cfg.accum - 1)
            with self.p.autocast():
                losses = torch.stack(self.forward(text[k :: self.cfg.accum], codes[k :: self.cfg.accum])) / 56
            self.scaler.scale(losses.sum() * self.p.world).backward()
            total += losses.detach()
        return self.p.sum(total.tolist())

    def steps(self, n, batch=None):
        """-> a row (text loss, image loss, gradient norm) a step."""
        rows = []
        for _ in range(n):
            losses = self.backward(batch or data(self.step))
            norm = optimizer_step(self.model, self.optimizer, self.scaler, self.cfg, self.step)
            self.ema.update(self.model, self.step)
            self.step += 1
            rows.append([*losses, float(norm)])
        return torch.tensor(rows)

    def weights(self):
        """Averaged weights, in the first process."""
        return {k: v.clone() for k, v in gather(self.ema.state_dict(self.model), self.p).items()}


def run(n, *args, **kw):
    r = Run(*args, **kw)
    return r.steps(n), r.weights()


FSDP, MUON = replace(TRAIN, strategy="fsdp"), replace(TRAIN, optimizer="muon")


def equality():
    """What the processes of test_replicas_and_shards_equal_one_process do."""
    out = {
        "ddp": run(4),
        "ddp, checkpointed": run(4, replace(TRAIN, checkpoint_activations=True)),
        "fsdp": run(4, FSDP),
        "fsdp, checkpointed": run(4, replace(FSDP, checkpoint_activations=True, accum=1)),
        "ddp bf16": run(4, precision="bf16"),
        "fsdp bf16": run(4, FSDP, "bf16"),
        "fsdp fp16": run(4, FSDP, "fp16"),
        "ddp, block scales": run(4, replace(TRAIN, block_scale=True)),
        "ddp, muon": run(4, MUON),
        "fsdp, muon, checkpointed": run(4, replace(MUON, strategy="fsdp", checkpoint_activations=True)),
        "fsdp, block scales, checkpointed": run(4, replace(FSDP, block_scale=True, checkpoint_activations=True)),
    }
    # float16: a gradient that overflows in one process's part only skips the step in all, and halves the scale
    r = Run(FSDP, "fp16")
    before = gather(r.model.state_dict(), r.p)
    r.backward(data(0))
    weight = r.model.blocks[1].mlp.up.weight
    if r.p.rank == 1:
        weight.grad.to_local()[0, 0] = torch.inf
    optimizer_step(r.model, r.optimizer, r.scaler, r.cfg, 0)
    after = gather(r.model.state_dict(), r.p)
    out["skipped"] = all(after[k].equal(v) for k, v in before.items()), r.scaler.get_scale()
    # block scales: a block with such a gradient is left out in all, and its scale falls in all
    b = Run(replace(FSDP, block_scale=True))
    before = gather(b.model.state_dict(), b.p)
    b.backward(data(0))
    if b.p.rank == 1:
        b.model.blocks[1].mlp.up.weight.grad.to_local()[0, 0] = torch.inf
    optimizer_step(b.model, b.optimizer, b.scaler, b.cfg, 0)
    after = gather(b.model.state_dict(), b.p)
    kept = {k for k, v in before.items() if after[k].equal(v)}
    out["left out"] = kept == {k for k in before if k.startswith("blocks.1.")}, b.p.gather(b.scaler.scales.tolist())
    # gains are gathered in float32, matrices in float16; parts, moments and averages are float32
    seen = {}
    r.model.blocks[0].register_forward_pre_hook(lambda m, _: seen.update({k: w.dtype for k, w in m.named_parameters()}))
    r.steps(2)
    kept = [r.optimizer.state[weight]["exp_avg"], r.ema.weights["blocks.1.mlp.up.weight"], weight]
    out["dtypes"] = seen, {(type(t), t.dtype, t.to_local().shape) for t in kept}
    # the copy that draws the samples is whole and plain
    copy = unsharded(r.model, r.p)
    out["copy"] = copy and (
        type(copy),
        all(v.equal(copy.state_dict()[k]) for k, v in gather(r.model.state_dict(), r.p).items()),
    )
    gather(r.model.state_dict(), r.p) if copy is None else None
    # gradients are summed once a step, whatever the parts
    r = Run(FSDP)
    with CommDebugMode() as sharded:
        r.backward(data(0))
    out["reductions"] = sum(n for op, n in sharded.get_comm_counts().items() if "reduce_scatter" in str(op))
    return out


def test_replicas_and_shards_equal_one_process():
    many = fork(2, equality)
    one = {"": run(4), "bf16": run(4, precision="bf16"), "fp16": run(4, precision="fp16"), "muon": run(4, MUON)}
    for name in [k for k in many if k.startswith(("ddp", "fsdp"))]:
        half = name[-4:] if name.endswith("16") else ""
        (losses, weights), (expected, averaged) = many[name], one["muon" if "muon" in name else half]
        muon = "muon" in name  # it rounds to bfloat16 on its way, and a step is about 2e-3 long
        assert torch.allclose(losses, expected, rtol=3e-3 if half else 1e-4 if muon else 1e-5), name
        atol = 1e-3 if muon else 3e-5  # of steps up to 1e-2; Adam divides small gradients by themselves
        assert half or all(torch.allclose(weights[k], w, atol=atol) for k, w in averaged.items()), name
    assert many["skipped"] == (True, 2.0**15)
    assert many["left out"][0]
    first, second = many["left out"][1]
    assert first == second and first[1] < 2.0**14 < first[0]
    seen, kept = many["dtypes"]
    assert seen["mlp.up.weight"] == torch.float16 and seen["norm1.weight"] == torch.float32
    assert kept == {(DTensor, torch.float32, (96, 32))}  # half of the 192 rows
    assert many["copy"] == (GPT, True)
    assert many["reductions"] == CFG.n_layer + 1


POWER = replace(TRAIN, powersgd=2)


def compression():
    """What the processes of test_powersgd do."""
    sent, reduce = Counter(), dist.all_reduce

    def count(tensor, *args, **kw):
        sent["bytes"] += tensor.nbytes
        return reduce(tensor, *args, **kw)

    out, plain, power = {}, Run(), Run(POWER)
    plain.forward.register_comm_hook(None, allreduce_hook)  # what DDP does anyway, but through Python
    dist.all_reduce = count
    for r, name in ((plain, "plain"), (power, "power")):
        out[name] = [r.steps(2)]
    for r, name in ((plain, "plain"), (power, "power")):
        sent.clear()
        r.backward(data(2))  # which also sums its two losses
        out[name] += [sent["bytes"] - 16, {k: w.grad.clone() for k, w in r.model.named_parameters()}]
        r.optimizer.zero_grad()
    dist.all_reduce = reduce
    out["learned"] = Run(POWER).steps(60, data(0))[[0, -1], :2].sum(1).tolist()
    r = Run(POWER, "fp16")  # an overflow must not stay in what is owed
    r.steps(3)
    r.scaler.update(2.0**24)
    out["overflow"] = r.steps(20)[:, 2]
    return out


def test_powersgd():
    """The blocks' gradients are sums of few outer products, all others exact; far fewer bytes are sent; it learns."""
    out = fork(2, compression)
    assert out["power"][0].equal(out["plain"][0])  # two steps that are not compressed
    grads, exact = out["power"][2], out["plain"][2]
    for name, g in grads.items():
        if name.startswith("blocks") and g.dim() == 2:
            assert torch.linalg.matrix_rank(g) == 2 < torch.linalg.matrix_rank(exact[name]), name
        else:
            assert torch.allclose(g, exact[name], atol=1e-7), name
    print(f"bytes that a process gives to all_reduce in a step: {out['plain'][1]}, with PowerSGD {out['power'][1]}")
    assert out["plain"][1] == 4 * sum(g.numel() for g in grads.values())
    rest = sum(g.numel() for k, g in grads.items() if not (k.startswith("blocks") and g.dim() == 2))
    thin = sum(2 * sum(g.shape) for k, g in grads.items() if k.startswith("blocks") and g.dim() == 2)
    assert out["power"][1] == 4 * (rest + thin)
    first, last = out["learned"]
    assert last < 0.5 * first
    assert not out["overflow"][0].isfinite() and out["overflow"][-1].isfinite()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(strategy="fsdp", powersgd=2), "powersgd 2 .*--strategy ddp"),
        (dict(powersgd=-1), "powersgd -1"),
        (dict(powersgd=30), "powersgd 30 makes no matrix of this model smaller"),
    ],
)
def test_powersgd_where_it_cannot_work_is_a_clear_error(change, message):
    with pytest.raises(ValueError, match=message):
        Run(replace(TRAIN, **change))
