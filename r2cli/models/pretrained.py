"""The pre-trained weights that torchvision and timm publish for their networks, downloaded once by their own code.

Only the command line asks for them: a checkpoint never does. No code in a downloaded file runs.
"""

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import torchvision
from torch import Tensor

from r2cli.errors import InputError
from r2cli.models import text, timm
from r2cli.models import torchvision as of_torchvision
from r2cli.storage.checkpoint import ModelSpec


@dataclass(frozen=True)
class Published:
    """Pre-trained weights: how many classes they tell apart, and how the images that they were trained on look."""

    classes: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def published(name: str) -> Published:
    """What is published for the network `name`. Raises InputError where there are no weights."""
    if timm.has(name):
        config = timm.published(name)
        if config is not None:
            return Published(config.num_classes, config.input_size[-1], tuple(config.mean), tuple(config.std))
    elif name in of_torchvision.names():
        best = _of_torchvision(name)
        if best is not None:
            seen = best.transforms()
            return Published(len(best.meta["categories"]), seen.crop_size[0], tuple(seen.mean), tuple(seen.std))
    where = "a text network starts from its own pre-trained weights" if text.has(name) else "give --weights FILE"
    raise InputError(f"nobody publishes weights of {name} that --pretrained could take: {where}")


def _of_torchvision(name: str) -> Any:
    weights = torchvision.models.get_model_weights(name)
    return getattr(weights, "DEFAULT", None)


def weights(spec: ModelSpec) -> Mapping[str, Tensor]:
    """The published weights of a network, by name. Raises InputError where they cannot be downloaded."""
    try:
        if timm.has(spec.name):
            return timm.pretrained(spec)
        with redirect_stdout(sys.stderr):  # torch prints while it downloads; standard output is for results
            state: Mapping[str, Tensor] = _of_torchvision(spec.name).get_state_dict(
                progress=False, check_hash=True, map_location="cpu", weights_only=True
            )
        return state
    except InputError:
        raise
    except Exception as error:  # whatever the libraries' ways of downloading raise
        line = " ".join(str(error).split())[:200]
        raise InputError(
            f"the pre-trained weights of {spec.name} could not be had ({type(error).__name__}: {line}): give "
            "--weights FILE, or run this once where the network can be reached"
        ) from error
