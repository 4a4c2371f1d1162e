"""Training on several processes, as `torchrun` starts them: each takes its share of every batch."""

import gc
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn


class Processes(NamedTuple):
    """The number of processes, and the rank of this one. Rank 0 prints and writes files."""

    number: int = 1
    rank: int = 0

    def share(self, batch: Tensor) -> Tensor:
        """Return this process's rows of `batch`, whose length must be a multiple of the number of processes."""
        size = len(batch) // self.number
        return batch[self.rank * size : (self.rank + 1) * size]

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of `values` over the processes, in all of them."""
        if self.number > 1:
            distributed.all_reduce(values)
            values /= self.number
        return values

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return `model` with its gradients averaged over the processes in every backward pass."""
        return model if self.number == 1 else nn.parallel.DistributedDataParallel(model)

    @contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """Join the others, over NCCL on GPUs and gloo on CPUs; each process has its GPU already."""
        if self.number == 1:
            yield
            return
        # The threads of a group end with the last reference to it, and have to end before the interpreter does. The
        # functions of this module keep the group that is there when they are imported, as a default argument. So they
        # are imported here, and not by DistributedDataParallel.
        importlib.import_module("torch.distributed.nn.functional")
        store, rank, number = next(distributed.rendezvous("env://"))
        # torchrun's store outlives a restart, and with it the addresses of the processes that it has ended
        store = distributed.PrefixStore(f"attempt {attempt()}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=store, rank=rank, world_size=number)
        try:
            yield
        finally:
            gc.collect()  # a wrapped model holds the group, too
            distributed.destroy_process_group()

    def wait(self) -> None:
        """Wait for the others, since torchrun may end those that still write when the first one ends."""
        if self.number > 1:
            with suppress(RuntimeError):  # another one has ended, and has said why
                distributed.barrier()


ALONE = Processes()


def started() -> Processes:
    """Return the number and rank of processes that torchrun has put into the environment, or one process without it."""
    return Processes(int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0)))


def attempt() -> int:
    """Return how many times torchrun has started the processes anew, since one of them was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
