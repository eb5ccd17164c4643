"""A running average of the weights, which is what is evaluated and kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def running(model: nn.Module, decay: float, *, statistics: bool) -> AveragedModel:
    """Return an exponential average of the parameters of `model`, and of BatchNorm's statistics if `statistics`.

    It is short at first, to forget the initial weights, as TensorFlow's is.
    """

    def update(averaged: Any, current: Any, count: Tensor | int) -> None:
        steps = int(count)
        own = min(decay, (1 + steps) / (10 + steps))
        get_ema_multi_avg_fn(own)(averaged, current, count)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=statistics)


@contextmanager
def parameters(model: nn.Module, average: AveragedModel | None) -> Iterator[None]:
    """In the block the model has the averaged parameters, if there is an average, and its own again after it."""
    if average is None:
        yield
        return
    own = [parameter.detach().clone() for parameter in model.parameters()]
    copy_parameters(average.module, model)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), own)


@torch.no_grad()
def copy_parameters(source: nn.Module, to: nn.Module) -> None:
    """Give `to` the parameters of `source`, a copy of the same network."""
    torch._foreach_copy_(list(to.parameters()), list(source.parameters()))
