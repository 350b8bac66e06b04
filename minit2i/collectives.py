"""Collective operations: torch.distributed if it is initialised, otherwise their results for one process."""

import torch
import torch.distributed as dist
import torch.distributed.nn.functional


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


def all_gather(x):
    """x (b, D) of every process -> (world*b, D) in rank order; gradients flow back to each process's own part."""
    if rank_and_world()[1] == 1:
        return x
    return torch.cat(torch.distributed.nn.functional.all_gather(x.contiguous()))


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
