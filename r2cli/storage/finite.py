"""Weights that are NaN or infinite: a grid would turn them into plain integers, and nobody would know."""

from collections.abc import Mapping

import torch
from torch import Tensor

from r2cli.errors import InputError

OTHERS = "give weights of a training run that did not diverge"


def require(tensors: Mapping[str, Tensor], origin: str, way_out: str) -> None:
    """Raise InputError with the name of the first of `tensors` of `origin` that holds NaN or infinite values.

    A mask of attention, which is 0 and minus infinity, is none of them. `way_out` ends the sentence.
    """
    for name, tensor in tensors.items():
        finite = torch.isfinite(tensor)
        if bool(finite.all()) or bool(((tensor == 0) | (tensor == -torch.inf)).all()):
            continue
        bad = int((~finite).sum())
        raise InputError(f"{origin}: tensor '{name}' has {bad} NaN or infinite values of {tensor.numel()}: {way_out}")
