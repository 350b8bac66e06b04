"""A model over several processes: replicated (DDP) or sharded (FSDP2).

Either way a step equals one process's step on the whole batch, up to rounding.  Sharded tensors are DTensors: each
process holds a slice along the first dimension.
"""

import functools

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from minit2i.collectives import rank_and_world
from minit2i.train import DTYPES


def blocks(model):
    """The elements of a model's ModuleLists, inner ones first: the units of sharding and of recomputation."""
    return [block for m in reversed(list(model.modules())) if isinstance(m, nn.ModuleList) for block in m]


def parallelize(model, procs, cfg, scaler):
    """Put a model on the device, over the processes -> the callable for training.

    cfg has strategy, powersgd, checkpoint_activations and compile.  The model may be sharded in place: make its
    optimizer and EMA afterwards, from the sharded parameters.
    Checkpointed activations: a block's input is kept, the rest is recomputed in the backward pass (Chen et al.,
    arXiv:1604.06174).
    """
    if cfg.powersgd and cfg.strategy != "ddp":
        raise ValueError(f"powersgd {cfg.powersgd} compresses gradients of replicas; use 0, or --strategy ddp")
    matrices = {w for block in blocks(model) for w in block.parameters() if w.dim() == 2}
    if cfg.powersgd and not any(w.numel() > sum(w.shape) * cfg.powersgd for w in matrices):
        raise ValueError(f"powersgd {cfg.powersgd} makes no matrix of this model smaller; use a smaller rank")
    sharded = cfg.strategy == "fsdp" and procs.world > 1
    for block in blocks(model):
        if cfg.compile and sharded:  # torch.compile cannot trace through the gathering of a block's weights
            block.forward = torch.compile(block.forward)
        if cfg.checkpoint_activations:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if sharded:
        shard(model, procs)
        return model
    forward = model.to(procs.device)
    if procs.world > 1:
        # no second copy of the gradients; masks and position tables are the same everywhere already
        forward = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
        if cfg.powersgd:
            forward.register_comm_hook(PowerSGD(matrices, cfg.powersgd, scaler), PowerSGD.hook)
    return torch.compile(forward) if cfg.compile else forward


def sync_gradients(forward, on):
    """Whether the next backward pass sums gradients over processes: only the last micro-batch needs to.

    A sharded model keeps whole gradients until then.
    """
    if isinstance(forward, FSDPModule):
        forward.set_requires_gradient_sync(on)
    else:
        forward.require_backward_grad_sync = on


# --- FSDP2 ---------------------------------------------------------------------------------------------


def shard(model, procs):
    """Shard a model in place, block by block (ZeRO stage 3, arXiv:1910.02054 sec. 5; FSDP, arXiv:2304.11277).

    The blocks' matrices are gathered in procs.precision; gains, biases, embeddings and heads in float32, as in DALL-E
    (2102.12092 sec. 2.4).  An older torch knows no exceptions within a block: it gathers all in float32, and autocast
    rounds the matrices.  Gradients are summed, and shards, moments and averages kept, in float32.
    """
    mesh = dist.init_device_mesh(procs.device.type, (procs.world,))
    policy = functools.partial(MixedPrecisionPolicy, reduce_dtype=torch.float32, cast_forward_inputs=False)
    half = policy()
    if hasattr(MixedPrecisionPolicy, "param_dtype_override_fn"):
        vectors = lambda w: torch.float32 if w.dim() < 2 else None  # noqa: E731
        half = policy(param_dtype=DTYPES[procs.precision], param_dtype_override_fn=vectors)
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=half)
    fully_shard(model, mesh=mesh, mp_policy=policy())
    if hasattr(model, "evaluate"):
        register_fsdp_forward_method(model, "evaluate")  # it gathers the weights, as a call of the model does


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
    """The model; if it is sharded, a copy with whole weights in the first process and None in the others."""
    if not is_sharded(tensors := model.state_dict()):
        return model
    tensors = unshard(tensors)
    if procs.main:
        copy = type(model)(model.cfg)  # FSDPModule.__new__ returns an instance of the class before sharding
        copy.load_state_dict(tensors)
        return copy.to(procs.device).eval()


# --- PowerSGD ------------------------------------------------------------------------------------------


class PowerSGD(PowerSGDState):
    """DDP's gradients as products of two thin matrices, with error feedback.  arXiv:1905.13727 algorithms 1 and 2.

    Only the matrices of the blocks are compressed, not embeddings, heads, gains and biases (DALL-E, 2102.12092).  The
    first two steps, also after resuming, are not, because DDP orders its buckets then; error-feedback buffers are not
    checkpointed.
    """

    __slots__ = ["matrices", "scaler", "scale"]

    def __init__(self, matrices, rank, scaler):
        super().__init__(None, rank, start_powerSGD_iter=2, min_compression_rate=1)
        self.matrices, self.scaler, self.scale = matrices, scaler, self.current_scale(scaler)

    @staticmethod
    def current_scale(scaler):
        """Changes whenever the buffers become invalid: a new loss scale, or an update that a BlockScaler skipped."""
        return scaler.get_scale(), getattr(scaler, "n_skipped", 0)

    def hook(self, bucket):
        now = self.current_scale(self.scaler)
        if bucket.index() == 0 and now != self.scale:  # the buffers are in units of the old scale, or not finite
            for memory in (self.error_dict, self.p_memory_dict, self.q_memory_dict):
                memory.clear()
            self.scale = now
        return powerSGD_hook(self, Bucket(bucket, self.matrices))


class Bucket:
    """DDP's bucket with all but the given matrices flattened: torch's hook does not compress vectors."""

    def __init__(self, bucket, matrices):
        self.bucket, self.matrices = bucket, matrices

    def gradients(self):
        pairs = zip(self.bucket.parameters(), self.bucket.gradients())
        return [g if w in self.matrices else g.flatten() for w, g in pairs]

    def __getattr__(self, name):
        return getattr(self.bucket, name)
