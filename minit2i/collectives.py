"""Collective operations: torch.distributed if it is initialised, otherwise their results for one process."""

import torch
import torch.distributed as dist


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
    dist.all_gather_object(things, thing)
    return things


def barrier():
    """Wait until all processes are here."""
    if rank_and_world()[1] > 1:
        dist.barrier()
