"""A model over several processes: replicated (DDP) or sharded (FSDP2).

Under either a step is that of one process on the whole batch, to rounding.  Sharded tensors are DTensors: this process's
part of each, along the first dimension.
"""

import functools

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def processes():
    """(rank, number) of the processes that train together; (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def reduce_sum(x):
    """Sum over all processes, in place; nothing to do for one process."""
    if processes()[1] > 1:
        dist.all_reduce(x)
    return x


def blocks(model):
    """The elements of a model's ModuleLists, inner ones first: what is sharded, and recomputed, as a unit."""
    return [block for m in reversed(list(model.modules())) if isinstance(m, nn.ModuleList) for block in m]


def parallelize(model, p, cfg, scaler):
    """Put a model on p's device, over p's processes, as cfg says -> what to call in training.

    cfg has strategy, powersgd, checkpoint_activations and compile.  The model itself may be sharded, in place: its optimizer
    and averages are made afterwards, from the parameters as they are then.
    Checkpointed activations: only what enters a block is kept, the rest computed again in the backward pass (Chen et al.,
    arXiv:1604.06174).
    """
    if cfg.powersgd < 0 or cfg.powersgd and cfg.strategy != "ddp":
        raise ValueError(f"powersgd {cfg.powersgd} is a rank, and for gradients of replicas; use 0, or --strategy ddp")
    matrices = {w for block in blocks(model) for w in block.parameters() if w.dim() == 2}
    if cfg.powersgd and not any(w.numel() > sum(w.shape) * cfg.powersgd for w in matrices):
        raise ValueError(f"powersgd {cfg.powersgd} makes no matrix of this model smaller; use a smaller rank")
    sharded = cfg.strategy == "fsdp" and p.world > 1
    for block in blocks(model):
        if cfg.compile and sharded:  # torch.compile stops where a block's weights are gathered
            block.forward = torch.compile(block.forward)
        if cfg.checkpoint_activations:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if sharded:
        shard(model, p)
        return model
    forward = model.to(p.device)
    if p.world > 1:
        # no second copy of the gradients; masks and position tables are the same everywhere already
        forward = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
        if cfg.powersgd:
            forward.register_comm_hook(PowerSGD(matrices, cfg.powersgd, scaler), PowerSGD.hook)
    return torch.compile(forward) if cfg.compile else forward


def sync_gradients(forward, on):
    """Whether the next backward pass sums gradients over processes: only the last part of a batch needs to.

    Sharded models then keep whole gradients in between.
    """
    if isinstance(forward, FSDPModule):
        forward.set_requires_gradient_sync(on)
    else:
        forward.require_backward_grad_sync = on


# --- FSDP2 -----------------------------------------------------------------------------------------------


def shard(model, p):
    """Shard a model in place, block by block (ZeRO stage 3, arXiv:1910.02054 sec. 5; FSDP, arXiv:2304.11277).

    The blocks' matrices are gathered in p.precision; gains, biases, embeddings and heads in float32, as DALL-E keeps them
    (2102.12092 sec. 2.4).  Gradients are summed, and parts, moments and averages kept, in float32.
    """
    mesh = dist.init_device_mesh(p.device.type, (p.world,))
    policy = functools.partial(MixedPrecisionPolicy, reduce_dtype=torch.float32, cast_forward_inputs=False)
    half = policy(
        param_dtype=DTYPES[p.precision], param_dtype_override_fn=lambda w: torch.float32 if w.dim() < 2 else None
    )
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=half)
    fully_shard(model, mesh=mesh, mp_policy=policy())


def is_sharded(tensors):
    return any(isinstance(t, DTensor) for t in tensors.values())


def gather(tensors, p):
    """Sharded tensors made whole, one after the other, in the first process's main memory; {} in the others."""
    if not is_sharded(tensors):
        return tensors
    whole = {}
    for k, t in tensors.items():
        t = t.full_tensor() if isinstance(t, DTensor) else t
        if p.main:
            whole[k] = t.cpu()
    return whole


def unsharded(model, p):
    """The model; if it is sharded, a copy with whole weights in the first process and None in the others."""
    if not is_sharded(tensors := model.state_dict()):
        return model
    tensors = gather(tensors, p)
    if p.main:
        copy = type(model)(model.cfg)  # of the class that fully_shard derived from: FSDPModule sees to that
        copy.load_state_dict(tensors)
        return copy.to(p.device).eval()


# --- PowerSGD --------------------------------------------------------------------------------------------


class PowerSGD(PowerSGDState):
    """DDP's gradients as products of two thin matrices, with error feedback.  arXiv:1905.13727 algorithms 1 and 2.

    Only the matrices of the blocks: embeddings, heads, gains and biases are summed as they are (DALL-E, 2102.12092).
    The first two steps, also after resuming, are not compressed, as DDP orders its buckets then; what was owed when a run
    stopped is forgotten.
    """

    __slots__ = ["matrices", "scaler", "scale"]

    def __init__(self, matrices, rank, scaler):
        super().__init__(None, rank, start_powerSGD_iter=2, min_compression_rate=1)
        self.matrices, self.scaler, self.scale = matrices, scaler, scaler.get_scale()

    def hook(self, bucket):
        if bucket.index() == 0 and self.scaler.get_scale() != self.scale:  # what is owed is in units of the old scale,
            for memory in (self.error_dict, self.p_memory_dict, self.q_memory_dict):  # or not finite
                memory.clear()
            self.scale = self.scaler.get_scale()
        return powerSGD_hook(self, Bucket(bucket, self.matrices))


class Bucket:
    """DDP's bucket, in which all but the given matrices are vectors, as torch's hook compresses no vectors."""

    def __init__(self, bucket, matrices):
        self.bucket, self.matrices = bucket, matrices

    def gradients(self):
        pairs = zip(self.bucket.parameters(), self.bucket.gradients())
        return [g if w in self.matrices else g.flatten() for w, g in pairs]

    def __getattr__(self, name):
        return getattr(self.bucket, name)
