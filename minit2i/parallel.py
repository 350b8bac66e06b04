"""A model over several processes: replicated (DDP), sharded (FSDP2), or sharded within a node and replicated between
nodes (HSDP).

In each way a step equals one process's step on the whole batch, up to rounding.  Sharded tensors are DTensors: each
process holds a slice along the first dimension.
"""

import functools
import math
import os

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from minit2i.attention import prepare
from minit2i.collectives import rank_and_world
from minit2i.train import DTYPES


def blocks(model):
    """The elements of a model's ModuleLists, inner ones first: the units of sharding and of recomputation."""
    return [block for m in reversed(list(model.modules())) if isinstance(m, nn.ModuleList) for block in m]


def block_matrices(model):
    """The matrices of the blocks: what PowerSGD compresses."""
    return {w for block in blocks(model) for w in block.parameters() if w.dim() == 2}


def parallelize(model, procs, cfg, scaler):
    """Put a model on the device, over the processes -> the callable for training.

    cfg has strategy, powersgd, checkpoint_activations and compile.  The model may be sharded in place: make its
    optimizer and EMA afterwards, from the sharded parameters.
    Checkpointed activations: a block's input is kept, the rest is recomputed in the backward pass (Chen et al.,
    arXiv:1604.06174).
    """
    if cfg.powersgd and cfg.strategy == "fsdp":
        raise ValueError(f"powersgd {cfg.powersgd} compresses gradients of replicas; use 0, or --strategy ddp or hsdp")
    if cfg.powersgd and not any(w.numel() > sum(w.shape) * cfg.powersgd for w in block_matrices(model)):
        raise ValueError(f"powersgd {cfg.powersgd} makes no matrix of this model smaller; use a smaller rank")
    sharded = cfg.strategy != "ddp" and procs.world > 1
    if cfg.compile:
        compile_blocks(model, DTYPES[procs.precision], procs.device)
    for block in blocks(model):
        if cfg.checkpoint_activations:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if sharded:
        shard(model, procs, cfg, scaler)
        return model
    forward = model.to(procs.device)
    if procs.world > 1:
        # no second copy of the gradients; masks and position tables are the same everywhere already
        forward = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
        if cfg.powersgd:
            forward.register_comm_hook(PowerSGD(model, cfg.powersgd, scaler), PowerSGD.bucket_hook)
    return forward


def compile_blocks(model, dtype, device):
    """Compile a prior's blocks, and its output layers with their losses, for training in `dtype`.

    Blocks of a kind share a graph, so it takes as long for 64 layers as for one; and torch.compile cannot trace through
    the gathering of a block's weights.  What is left outside are embeddings, the last norm and the optimizer.
    """
    torch._dynamo.config.recompile_limit = 64  # kinds of blocks, masks, training and evaluation
    prepare(model, model.cfg.n_embd // model.cfg.n_head, dtype, device)
    for block in blocks(model):
        block.forward = torch.compile(block.forward)
    model.head_loss = torch.compile(model.head_loss, dynamic=False)  # text and codes: a graph each


def sync_gradients(forward, on):
    """Whether the next backward pass sums gradients over processes: only the last micro-batch needs to.

    A sharded model keeps whole gradients until then.
    """
    if isinstance(forward, FSDPModule):
        forward.set_requires_gradient_sync(on)
    else:
        forward.require_backward_grad_sync = on


# --- FSDP2 ---------------------------------------------------------------------------------------------


def nodes_of(procs, strategy):
    """How many nodes shard the model each for itself: torchrun's with hsdp, else 1 with all processes."""
    node = int(os.environ.get("LOCAL_WORLD_SIZE", procs.world)) if strategy == "hsdp" else procs.world
    if procs.world % node:
        raise ValueError(f"hsdp needs as many processes on each node; {procs.world} is not a multiple of {node}")
    return procs.world // node


def shard(model, procs, cfg, scaler):
    """Shard a model in place, block by block (ZeRO stage 3, arXiv:1910.02054 sec. 5; FSDP, arXiv:2304.11277).

    The blocks' matrices are gathered in procs.precision; gains, biases, embeddings and heads in float32, as in DALL-E
    (2102.12092 sec. 2.4).  An older torch knows no exceptions within a block: it gathers all in float32, and autocast
    rounds the matrices.  Gradients are summed, and shards, moments and averages kept, in float32.

    hsdp is DALL-E's arrangement (sec. 2.5): a node's fast links carry weights and gradients, and between nodes only the
    shards of gradients are averaged.
    """
    nodes = nodes_of(procs, cfg.strategy)
    sizes, names = (nodes, procs.world // nodes), ("replicas", "shards")
    mesh = dist.init_device_mesh(procs.device.type, sizes, mesh_dim_names=names)
    policy = functools.partial(MixedPrecisionPolicy, reduce_dtype=torch.float32, cast_forward_inputs=False)
    half = policy()
    if hasattr(MixedPrecisionPolicy, "param_dtype_override_fn"):
        vectors = lambda w: torch.float32 if w.dim() < 2 else None  # noqa: E731
        half = policy(param_dtype=DTYPES[procs.precision], param_dtype_override_fn=vectors)
    for block in blocks(model):
        fully_shard(block, mesh=mesh["shards"], mp_policy=half)
    fully_shard(model, mesh=mesh["shards"], mp_policy=policy())
    if hasattr(model, "evaluate"):
        register_fsdp_forward_method(model, "evaluate")  # it gathers the weights, as a call of the model does
    if nodes > 1:
        average_nodes(model, mesh, cfg, scaler)


def average_nodes(model, mesh, cfg, scaler):
    """Let FSDP2 average over the replicas what it has summed within a node, compressed with cfg.powersgd.

    Its own HSDP has no place for compression, and lets Muon talk between nodes.
    """
    power = PowerSGD(model, cfg.powersgd, scaler, mesh["replicas"].get_group())
    for block in blocks(model):
        block.set_all_reduce_hook(functools.partial(power.shard_hook, [*block.parameters()], mesh["shards"].size()))
    model.set_all_reduce_hook(lambda flat: power.average_([None], [flat]))


def is_sharded(tensors):
    """Whether any of {name: tensor} is a shard (FSDP)."""
    return any(isinstance(t, DTensor) for t in tensors.values())


def unshard(tensors):
    """{name: DTensor} -> whole tensors, one at a time, in the first process's main memory; {} in the others."""
    if not is_sharded(tensors):
        return tensors
    whole = {}
    for k, t in tensors.items():
        t = t.full_tensor() if isinstance(t, DTensor) else t
        if rank_and_world()[0] == 0:
            whole[k] = t.cpu()
    return whole


def unsharded(model, procs):
    """The model; if it is sharded, a copy with whole weights in the first process, None in the others.

    None everywhere, and a word why, if the first GPU has no room for a copy.
    """
    if not is_sharded(tensors := model.state_dict()):
        return model
    tensors = unshard(tensors)
    if procs.main:
        copy = type(model)(model.cfg)  # FSDPModule.__new__ returns an instance of the class before sharding
        copy.load_state_dict(tensors)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        if size > 0.8 * free_memory(procs.device):
            return procs.say("no samples: the GPU has no room for the whole model; sample.py draws them elsewhere")
        return copy.to(procs.device).eval()


def free_memory(device):
    """Bytes that a GPU has left; of other devices, which share the computer's memory: without limit."""
    if device.type != "cuda":
        return math.inf
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


# --- PowerSGD ------------------------------------------------------------------------------------------


IDENTITY = 1e-8  # share of the identity that is added before orthogonalization; DALL-E: "a small multiple"


class PowerSGD:
    """Averages gradients over replicas as products of two thin matrices, with error feedback.  arXiv:1905.13727
    algorithms 1 and 2; as in DALL-E, 2102.12092 sec. 2.5.

    Only the matrices of the blocks are compressed, not embeddings, heads, gains and biases; of shards, each process
    factors its own.  Orthogonalization is Householder's.  Error buffers are in units of the unscaled gradient, which
    lets a loss scale change, and a gradient with NaN or Inf leaves its buffer as it was: DALL-E minimises the
    instances in which a buffer is zeroed.  Deviations: buffers are float32 (DALL-E: 16 bits) and not checkpointed, so a
    resumed run begins with empty ones; a bucket's averages are not overlapped with the backward pass.

    rank 0: nothing is compressed.  scaler: a GradScaler or BlockScaler; group: the replicas (None: all processes).
    """

    def __init__(self, model, rank, scaler, group=None):
        self.rank, self.scaler, self.group = rank, scaler, group
        self.matrices = block_matrices(model) if rank else set()
        branches = [m for m in model.modules() if getattr(m, "gradient_scale", None) is not None]
        self.scales = {w: branch.gradient_scale for branch in branches for w in branch.parameters()}  # BlockScaler's
        self.error, self.q = {}, {}  # of each matrix (n, m): (n, m) and (m, rank)

    def means(self, tensors):
        """Their means over the replicas, by one all_reduce."""
        if not tensors:
            return []
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat, group=self.group)
        parts = flat.div_(dist.get_world_size(self.group)).split([t.numel() for t in tensors])
        return [part.view_as(t) for part, t in zip(parts, tensors)]

    @torch.no_grad()
    def average_(self, params, grads):
        """Average over the replicas, in place.  grads: of params; of a shard's matrix a slice of its rows."""
        smaller = [w in self.matrices and g.numel() > sum(g.shape) * self.rank for w, g in zip(params, grads)]
        whole = [g for g, thin in zip(grads, smaller) if not thin]
        for g, mean in zip(whole, self.means(whole)):
            g.copy_(mean)
        pairs = [(w, g) for w, g, thin in zip(params, grads, smaller) if thin]
        for w, g in pairs:
            if w not in self.q:  # the same in all replicas
                generator = torch.Generator().manual_seed(len(self.q))
                self.q[w] = torch.randn(g.shape[1], self.rank, generator=generator).to(g)
                self.error[w] = torch.zeros_like(g)
        self.compress_(pairs)

    def compress_(self, pairs):
        """Average matrices [(parameter, gradient)]."""
        one = self.scaler.scale(torch.ones((), device=pairs[0][1].device)) if pairs else 1
        scales = [one * self.scales.get(w, 1) for w, _ in pairs]
        m = [g + scale * self.error[w] for (w, g), scale in zip(pairs, scales)]  # (n, m)
        p = self.means([x @ self.q[w] for x, (w, _) in zip(m, pairs)])  # (n, rank)
        fine = [x.isfinite().all() for x in p]
        p = [torch.where(ok, x, 0) + IDENTITY * torch.eye(*x.shape, device=x.device) for ok, x in zip(fine, p)]
        p = [torch.linalg.qr(x).Q for x in p]
        q = self.means([x.mT @ y for x, y in zip(m, p)])  # (m, rank)
        for (w, g), scale, ok, x, left, right in zip(pairs, scales, fine, m, p, q):
            ok = ok & right.isfinite().all()
            g.copy_(torch.where(ok, left @ right.mT, torch.nan))
            self.error[w] = torch.where(ok, (x - g) / scale, self.error[w])
            self.q[w] = torch.where(ok, right, self.q[w])

    def bucket_hook(self, bucket):
        """DDP's communication hook -> a future of the bucket's averages."""
        self.average_(bucket.parameters(), bucket.gradients())
        buffer = bucket.buffer()
        done = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else None)
        done.set_result(buffer)
        return done

    def shard_hook(self, params, n_shards, flat):
        """FSDP2's all-reduce hook: flat holds a slice of each parameter's gradient, all of ceil(rows / n_shards)."""
        shapes = [(-(-w.shape[0] // n_shards), *w.shape[1:]) for w in params]
        parts = flat.split([math.prod(shape) for shape in shapes])
        self.average_(params, [part.view(shape) for part, shape in zip(parts, shapes)])
