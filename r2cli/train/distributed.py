"""Several processes that train one network, started by torchrun, with torch's DistributedDataParallel.

Every process holds the whole network and gets its share of every batch; gradients are averaged. Only the first process
prints and writes files. Without torchrun nothing here has any effect.
"""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as group
from torch import Tensor, nn
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from r2cli.data.splits import ALL_ROWS, RowShare

_connections = itertools.count()  # of this process; all processes count alike
PATIENCE = timedelta(minutes=30)  # a process may evaluate or decode alone for so long before the others give up


@contextmanager
def together(device: torch.device) -> Iterator[None]:
    """Connect the processes that torchrun started, and disconnect them at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    store, rank, world = next(rendezvous("env://", timeout=PATIENCE))
    # Each connection has names of its own in the store: a second one could read the addresses of the first.
    own = PrefixStore(f"r2-{next(_connections)}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    group.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=PATIENCE)
    try:
        yield
    finally:
        group.destroy_process_group()


def share() -> RowShare:
    """Return which rows of every batch this process gets."""
    return RowShare(group.get_rank(), group.get_world_size()) if group.is_initialized() else ALL_ROWS


def wrapped(model: nn.Module, device: torch.device) -> nn.Module:
    """Return `model` as it is called in training, so that its gradients are the mean over all processes."""
    if not group.is_initialized():
        return model
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def add_up(*numbers: Tensor) -> list[Tensor]:
    """Return each of `numbers` () summed over all processes, float64."""
    both = torch.stack([number.detach().double() for number in numbers])
    if group.is_initialized():
        group.all_reduce(both)
    return list(both)


def spread_buffers(*models: nn.Module | None) -> None:
    """Give every process the buffers of the first one: until then BatchNorm's statistics are of its own images."""
    if group.is_initialized():
        for model in models:
            for buffer in model.buffers() if model is not None else ():
                group.broadcast(buffer, 0)


def end_others() -> None:
    """End every process but the first, which prints and writes what is left to do after training."""
    if int(os.environ.get("RANK", "0")) > 0 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SystemExit(0)
