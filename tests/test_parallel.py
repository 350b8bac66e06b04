"""Replicas and shards match one process up to rounding; PowerSGD compresses as it says."""

import os
from collections import Counter
from copy import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from priors import batch, build
from processes import fork
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from minit2i.collectives import gather_objects
from minit2i.fp16 import make_scaler
from minit2i.gpt import GPT, MODELS, build_prior, head_loss
from minit2i.parallel import PowerSGD, compile_blocks, parallelize, sync_gradients, unshard, unsharded
from minit2i.resume import Learner, load_state, save_run
from minit2i.train import EMA, Processes, make_optimizer, optimizer_step
from train_prior import PriorTrainConfig

CFG = dict(n_layer=2, n_head=2, n_embd=32, text_len=8, n_vocab=40, n_codes=33, grid_h=2, grid_w=3)
TRAIN = PriorTrainConfig(out="", lr=1e-2, warmup=2, steps=100, ema=0.9, clip=1.0, accum=2)


def data(step):
    g = torch.Generator().manual_seed(step)
    return {"text": torch.randint(0, 40, (8, 8), generator=g), "codes": torch.randint(0, 33, (8, 6), generator=g)}


class Run:
    """A few steps of train_prior's loop with 8 images a step."""

    def __init__(self, cfg=TRAIN, precision="fp32", init_scale=2.0**16):
        torch.manual_seed(0)
        self.cfg, self.procs = cfg, Processes("cpu") if not dist.is_initialized() else copy(Run.procs)
        self.procs.precision, Run.procs = precision, self.procs
        self.model = build_prior(CFG)
        self.scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16", init_scale=init_scale)
        if cfg.block_scale:
            self.scaler = make_scaler(self.model, cfg, self.procs)
        self.forward = parallelize(self.model, self.procs, cfg, self.scaler)
        self.optimizer = make_optimizer(self.model, cfg, cfg.optimizer == "muon")
        self.ema, self.step = EMA(self.model, cfg.ema), 0

    def backward(self, batch):
        batch = {k: t.chunk(self.procs.world)[self.procs.rank] for k, t in batch.items()}
        total = torch.zeros(2)
        for k in range(self.cfg.accum):
            sync_gradients(self.forward, k == self.cfg.accum - 1)
            with self.procs.autocast():
                losses = self.forward({name: t[k :: self.cfg.accum] for name, t in batch.items()})
            losses = torch.stack([losses["text"], losses["image"]]) / 56
            self.scaler.scale(losses.sum() * self.procs.world).backward()
            total += losses.detach()
        return self.procs.sum(total.tolist())

    def steps(self, n, batch=None):
        """-> a row (text loss, image loss, gradient norm) per step."""
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
        return {k: v.clone() for k, v in unshard(self.ema.state_dict(self.model)).items()}


def run(n, *args, **kw):
    r = Run(*args, **kw)
    return r.steps(n), r.weights()


FSDP, MUON = replace(TRAIN, strategy="fsdp"), replace(TRAIN, optimizer="muon")
HSDP, POWER = replace(TRAIN, strategy="hsdp", accum=1), replace(TRAIN, powersgd=2)


class Operations(TorchDispatchMode):
    """Context that counts the operations called, by name."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count[str(op)] += 1
        return op(*args, **kwargs or {})


def equality():
    """Run by each process of test_replicas_and_shards_match_one_process."""
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
    # float16: a gradient that overflows in one process skips the step in all, and halves the scale
    r = Run(FSDP, "fp16")
    before = unshard(r.model.state_dict())
    r.backward(data(0))
    weight = r.model.blocks[1].mlp.f.up.weight
    if r.procs.rank == 1:
        weight.grad.to_local()[0, 0] = torch.inf
    optimizer_step(r.model, r.optimizer, r.scaler, r.cfg, 0)
    after = unshard(r.model.state_dict())
    out["skipped"] = all(after[k].equal(v) for k, v in before.items()), r.scaler.get_scale()
    # block scales: a branch with such a gradient is skipped in all, and its scale falls in all
    b = Run(replace(FSDP, block_scale=True))
    before = unshard(b.model.state_dict())
    b.backward(data(0))
    if b.procs.rank == 1:
        b.model.blocks[1].mlp.f.up.weight.grad.to_local()[0, 0] = torch.inf
    optimizer_step(b.model, b.optimizer, b.scaler, b.cfg, 0)
    after = unshard(b.model.state_dict())
    kept = {k for k, v in before.items() if after[k].equal(v)}
    out["left out"] = (
        kept == {k for k in before if k.startswith("blocks.1.mlp.")},
        gather_objects(b.scaler.scales.tolist()),
    )
    # gains are gathered in float32, matrices in float16; shards, moments and averages are float32
    seen = {}
    r.model.blocks[0].register_forward_pre_hook(lambda m, _: seen.update({k: w.dtype for k, w in m.named_parameters()}))
    r.steps(2)
    kept = [r.optimizer.state[weight]["exp_avg"], r.ema.weights["blocks.1.mlp.f.up.weight"], weight]
    out["dtypes"] = seen, {(type(t), t.dtype, t.to_local().shape) for t in kept}
    # the copy that generates the samples is whole and plain
    copy = unsharded(r.model, r.procs)
    out["copy"] = copy and (
        type(copy),
        all(v.equal(copy.state_dict()[k]) for k, v in unshard(r.model.state_dict()).items()),
    )
    unshard(r.model.state_dict()) if copy is None else None
    # gradients are summed once per step, not per micro-batch
    r = Run(FSDP)
    with Operations() as sharded:
        r.backward(data(0))
    out["reductions"] = sum(n for op, n in sharded.count.items() if "reduce_scatter" in op)
    return out


def test_replicas_and_shards_match_one_process():
    many = fork(2, equality)
    one = {"": run(4), "bf16": run(4, precision="bf16"), "fp16": run(4, precision="fp16"), "muon": run(4, MUON)}
    for name in [k for k in many if k.startswith(("ddp", "fsdp"))]:
        half = name[-4:] if name.endswith("16") else ""
        (losses, weights), (expected, averaged) = many[name], one["muon" if "muon" in name else half]
        muon = "muon" in name  # it computes in bfloat16
        assert torch.allclose(losses, expected, rtol=3e-3 if half or muon else 1e-4), name
        # Adam divides small gradients by themselves: one that is all rounding may move its weight by a whole step, 1e-2,
        # the other way; the mean of a matrix of 1024 weights or more then moves by 2e-5
        atol = 4e-4 if muon else 1e-4
        assert half or all((weights[k] - w).abs().mean() < atol for k, w in averaged.items()), name
    assert many["skipped"] == (True, 2.0**15)
    assert many["left out"][0]
    first, second = many["left out"][1]
    assert first == second and first[3] < 2.0**14 < min(first[:3])
    seen, kept = many["dtypes"]
    mixed = hasattr(MixedPrecisionPolicy, "param_dtype_override_fn")  # an older torch keeps all of a block in float32
    assert seen["mlp.f.up.weight"] == (torch.float16 if mixed else torch.float32)
    assert seen["attn.norm.weight"] == torch.float32
    assert kept == {(DTensor, torch.float32, (96, 32))}  # half of the 192 rows
    assert many["copy"] == (GPT, True)
    assert many["reductions"] == CFG["n_layer"] + 1


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"model": m} for m in MODELS if m != "llama"] + [{"condition": "encoder"}], ids=str)
def test_compiled_training_is_the_same_without_a_break_and_compiles_once(how, monkeypatch):
    """Blocks, and the output layers with their losses; a graph that breaks is an error here."""
    model, fully, graphs = build(**how, fp32_logits=True), torch.compile, []
    inputs = model.corrupt(batch(model), range(3))
    backend = lambda graph, inputs: graphs.append(graph) or graph  # noqa: E731
    monkeypatch.setattr("torch.compile", lambda f, **how: fully(f, backend=backend, fullgraph=True, **how))
    losses, gradients, n_graphs = [], [], []
    for step in range(4):
        if step == 1:
            torch._dynamo.reset()
            compile_blocks(model, torch.float32, torch.device("cpu"))
        loss = sum(model(inputs, train=True).values())
        losses.append(loss.detach()), n_graphs.append(len(graphs))
        gradients.append(torch.autograd.grad(loss, [*model.parameters()], allow_unused=True))
    assert any("cross_entropy" in graph.code for graph in graphs)
    assert n_graphs[0] == 0 < n_graphs[1] and n_graphs[2] == n_graphs[3]
    for loss, found in zip(losses[1:], gradients[1:]):
        assert loss.equal(losses[0])
        assert all(a is b is None or torch.allclose(a, b, atol=1e-6) for a, b in zip(found, gradients[0]))


@pytest.mark.slow
def test_a_compiled_loss_keeps_its_logits_once_and_in_half_precision():
    """The partition is Inductor's."""
    x, weight, found = torch.randn(2, 64, 32, requires_grad=True), torch.nn.Parameter(torch.randn(512, 32)), []
    torch._dynamo.reset()
    for f in (head_loss, torch.compile(head_loss, dynamic=False, backend="aot_eager_decomp_partition")):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # noqa: B023
            with torch.autocast("cpu", torch.bfloat16):
                f(x, weight, torch.zeros(2, 64, dtype=torch.long), False)
        found.append([t.dtype for t in kept if t.numel() == 2 * 64 * 512])
    assert found == [[torch.float32] * 2, [torch.bfloat16]]


def compiled():
    """Run by each process of test_replicas_and_shards_are_compiled."""
    fully, torch.compile = torch.compile, lambda f, **how: fully(f, backend="aot_eager", **how)
    out = {name: run(3, replace(cfg, compile=True)) for name, cfg in (("ddp", TRAIN), ("fsdp", FSDP))}
    torch.compile = fully
    return out


@pytest.mark.slow
def test_replicas_and_shards_are_compiled():
    losses, weights = run(3)
    for name, (found, averaged) in fork(2, compiled).items():
        assert torch.allclose(found, losses, rtol=1e-4), name
        assert all((weights[k] - w).abs().mean() < 1e-4 for k, w in averaged.items()), name


# --- shards within a node, replicas between nodes ---


def two_nodes(folder):
    """Run by each of four processes, two nodes of two."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    out = {
        "plain": run(4, HSDP),
        "checkpointed, fp16": run(4, replace(HSDP, checkpoint_activations=True), "fp16"),
        "muon": run(4, replace(HSDP, optimizer="muon")),
        "block scales": run(4, replace(HSDP, block_scale=True)),
    }
    r = Run(HSDP)
    with Operations() as count:
        r.backward(data(0))
    out["sums"] = [sum(n for op, n in count.count.items() if name in op) for name in ("reduce_scatter", "allreduce")]
    exact = {k: w.grad.to_local() for k, w in r.model.named_parameters()}
    # compressed between the nodes: a shard's gradient is projected on two directions, the same in both nodes
    r = Run(replace(HSDP, powersgd=2))
    r.backward(data(0))
    out["compressed"], out["weights"] = Counter(), {}
    for k, w in r.model.named_parameters():
        g, thin = w.grad.to_local(), k.startswith("blocks") and w.dim() == 2
        basis = torch.linalg.svd(g, full_matrices=False)[0][:, :2] if thin else None
        expected = basis @ (basis.mT @ exact[k]) if thin else exact[k]
        lossy = not torch.allclose(g, exact[k], atol=1e-6)
        out["compressed"][thin, lossy, torch.allclose(g, expected, atol=1e-6)] += 1
        out["weights"][k] = w.to_local().shape, w.shape
    r = Run(replace(HSDP, powersgd=2))
    out["learned"] = r.steps(40, data(0))[[0, -1], :2].sum(1).tolist()
    # a state is saved once, not by each node, and read by both
    save_run(folder, {}, 40, {"model": Learner(r.model, r.optimizer, r.scaler)}, r.ema)
    again = Run(HSDP)
    load_state(folder, {"model": Learner(again.model, again.optimizer, again.scaler)}, again.ema)
    pairs = zip(r.model.parameters(), again.model.parameters())
    moments = [
        r_.optimizer.state[w]["exp_avg"].to_local() for r_ in (r, again) for w in list(r_.model.parameters())[:1]
    ]
    same = all(a.to_local().equal(b.to_local()) for a, b in pairs) and moments[0].equal(moments[1])
    size = sum(f.stat().st_size for f in (folder / "state" / "step-000040").iterdir())
    out["resumed"] = gather_objects(same), size / sum(4 * w.numel() for w in r.model.parameters())
    return out


def test_shards_within_a_node_match_one_process(tmp_path):
    """2 x 2 processes equal one; with PowerSGD a step equals its definition."""
    many = fork(4, two_nodes, tmp_path)
    single = replace(TRAIN, accum=1)
    one = {"": run(4, single), "fp16": run(4, single, "fp16"), "muon": run(4, replace(single, optimizer="muon"))}
    for name in ("plain", "checkpointed, fp16", "muon", "block scales"):
        (losses, weights), (expected, averaged) = many[name], one[name.split()[-1] if name.split()[-1] in one else ""]
        assert torch.allclose(losses, expected, rtol=1e-4 if expected is one[""][0] else 3e-3), name
        rounding = 1e-4 if name != "muon" else 4e-4
        assert "fp16" in name or all((weights[k] - w).abs().mean() < rounding for k, w in averaged.items()), name
    # each block's shards, and what is outside: summed within the node, then between nodes (and the losses' sum)
    assert many["sums"] == [CFG["n_layer"] + 1, CFG["n_layer"] + 1 + 1]
    n = len([*build_prior(CFG).parameters()])
    thin = 4 * CFG["n_layer"]  # qkv, out, up, down
    assert many["compressed"] == {(True, True, True): thin, (False, False, True): n - thin}
    assert many["weights"]["blocks.0.mlp.f.up.weight"] == ((96, 32), (192, 32))
    first, last = many["learned"]
    assert last < 0.6 * first
    assert all(many["resumed"][0]) and 4 < many["resumed"][1] < 4.5  # weights, two moments, averages


# --- PowerSGD ---


def compression():
    """Run by each process of test_powersgd."""
    sent, reduce = Counter(), dist.all_reduce

    def count(tensor, *args, **kw):
        sent["bytes"] += tensor.nbytes
        return reduce(tensor, *args, **kw)

    out, plain, power = {}, Run(), Run(POWER)
    plain.forward.register_comm_hook(None, allreduce_hook)  # DDP's default, in Python
    dist.all_reduce = count
    for r, name in ((plain, "plain"), (power, "power")):
        sent.clear()
        r.backward(data(0))  # also sums its two losses, 16 bytes
        out[name] = sent["bytes"] - 16, {k: w.grad.clone() for k, w in r.model.named_parameters()}
    dist.all_reduce = reduce
    out["learned"] = Run(POWER).steps(60, data(0))[[0, -1], :2].sum(1).tolist()
    r = Run(POWER, "fp16")
    r.steps(3)
    r.scaler.update(2.0**24)
    out["overflow"] = r.steps(20)[:, 2]
    return out


def test_powersgd():
    """The blocks' gradients have rank 2, all others are exact; far fewer bytes are sent; it learns."""
    out = fork(2, compression)
    (power_bytes, grads), (plain_bytes, exact) = out["power"], out["plain"]
    for name, g in grads.items():
        if name.startswith("blocks") and g.dim() == 2:
            assert torch.linalg.matrix_rank(g) == 2 < torch.linalg.matrix_rank(exact[name]), name
        else:
            assert torch.allclose(g, exact[name], atol=1e-7), name
    assert plain_bytes == 4 * sum(g.numel() for g in grads.values())
    rest = sum(g.numel() for k, g in grads.items() if not (k.startswith("blocks") and g.dim() == 2))
    thin = sum(2 * sum(g.shape) for k, g in grads.items() if k.startswith("blocks") and g.dim() == 2)
    assert power_bytes == 4 * (rest + thin)
    first, last = out["learned"]
    assert last < 0.5 * first
    assert not out["overflow"][0].isfinite() and out["overflow"][-1].isfinite()


SCALES = [1.0, 1.0, 8.0, 8.0, 2.0]  # of the loss, in five steps


def replica_gradients(step):
    """The gradients of a matrix in two replicas, times the loss scale; in the third step one overflows."""
    g = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(step)) * SCALES[step]
    g[0, 3, 4] = torch.inf if step == 2 else g[0, 3, 4]
    return g


def averages():
    """Run by each process: what PowerSGD makes of those gradients."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    rank = Processes("cpu").rank
    model = torch.nn.ModuleList([torch.nn.Linear(32, 64, bias=False)])
    power, means = PowerSGD(model, 4, scaler), []
    for step, scale in enumerate(SCALES):
        scaler.scale(torch.ones(()))
        scaler.update(scale)
        grad = replica_gradients(step)[rank]
        power.average_([*model.parameters()], [grad])
        means.append(grad / scale)
    return means


def test_powersgd_equals_a_loop():
    """Algorithms 1 and 2, with buffers that outlive a new loss scale and a step with Inf."""
    found = fork(2, averages)
    q, error = torch.randn(32, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 64, 32)
    for step, scale in enumerate(SCALES):
        m = replica_gradients(step) / scale + error
        if step == 2:
            assert found[step].isnan().all()
            continue
        p = torch.linalg.qr((m @ q).mean(0)).Q
        q = (m.mT @ p).mean(0)
        mean, error = p @ q.mT, m - p @ q.mT
        assert torch.allclose(found[step], mean, atol=1e-4), step
        assert not torch.allclose(mean, replica_gradients(step).mean(0) / scale, atol=0.1)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(strategy="fsdp", powersgd=2), "powersgd 2 .*--strategy ddp or hsdp"),
        (dict(powersgd=30), "powersgd 30 makes no matrix of this model smaller"),
    ],
)
def test_powersgd_that_cannot_work_is_a_clear_error(change, message):
    with pytest.raises(ValueError, match=message):
        Run(replace(TRAIN, **change))
