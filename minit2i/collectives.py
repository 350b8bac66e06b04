"""Collective operations: torch.distributed if it is initialised, otherwise their results for one process."""

from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist


def connect(device):
    """Join the processes that torchrun started.

    NCCL gives up after minutes, as a job that hangs holds its GPUs: where the others wait for one (which trains the text
    model, encodes its share, samples or saves), `barrier` and `gather_objects` wait hours on the CPU.
    """
    if device.type == "cuda":
        dist.init_process_group("nccl", timeout=timedelta(minutes=15), device_id=device)
    else:
        dist.init_process_group("gloo", timeout=PATIENCE)


PATIENCE = timedelta(hours=4)


@cache
def patient(world):
    """A group of the same processes that waits for hours, made once; all ask for it at the same place."""
    return world if dist.get_backend(world) == "gloo" else dist.new_group(backend="gloo", timeout=PATIENCE)


def rank_and_world():
    """(rank of this process, number of processes); (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_reduce_sum(x):
    """Sum a tensor over all processes, in place -> x."""
    if rank_and_world()[1] > 1:
        dist.all_reduce(x)
    return x


class AllGather(torch.autograd.Function):
    """Concatenate a tensor of every process; the gradient of a part is summed over all processes."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(rank_and_world()[1])]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        rank, world = rank_and_world()
        return all_reduce_sum(gradient.clone()).chunk(world)[rank]


def all_gather(x):
    """x (b, D) of every process -> (world*b, D) in rank order; gradients flow back to each process's own part."""
    return x if rank_and_world()[1] == 1 else AllGather.apply(x.contiguous())


def gather_objects(thing):
    """A small Python object of every process -> list in rank order, on every process."""
    if rank_and_world()[1] == 1:
        return [thing]
    things = [None] * rank_and_world()[1]
    dist.all_gather_object(things, thing, group=patient(dist.group.WORLD))
    return things


def barrier():
    """Wait until all processes are here."""
    if rank_and_world()[1] > 1:
        dist.barrier(patient(dist.group.WORLD))
