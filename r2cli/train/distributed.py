"""Several processes that train one network, started by torchrun: DistributedDataParallel, and nothing of our own.

Every process holds the whole network and sees its share of every batch; gradients are averaged. The first one alone
prints and writes files. Without torchrun everything here does nothing.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as group
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from r2cli.data.splits import ALL_ROWS, RowShare

PATIENCE = timedelta(minutes=30)  # a process may evaluate or decode alone for so long before the others give up


@contextmanager
def together(device: torch.device) -> Iterator[None]:
    """The processes that torchrun started meet here, and part at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    group.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        group.destroy_process_group()


def share() -> RowShare:
    """What this process gets of every batch."""
    return RowShare(group.get_rank(), group.get_world_size()) if group.is_initialized() else ALL_ROWS


def wrapped(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` as it is called in training: its gradients are the mean over all processes."""
    if not group.is_initialized():
        return model
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def add_up(*numbers: Tensor) -> list[Tensor]:
    """Each scalar summed over all processes, float64."""
    both = torch.stack([number.detach().double() for number in numbers])
    if group.is_initialized():
        group.all_reduce(both)
    return list(both)


def spread_buffers(*models: nn.Module | None) -> None:
    """Give every process the first one's buffers: BatchNorm's statistics are those of its own images until then."""
    if group.is_initialized():
        for model in models:
            for buffer in model.buffers() if model is not None else ():
                group.broadcast(buffer, 0)


def end_others() -> None:
    """Training is over: what is left to print and to write is the first process's work, and the others end here."""
    if int(os.environ.get("RANK", "0")) > 0 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SystemExit(0)
