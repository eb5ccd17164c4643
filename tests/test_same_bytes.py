"""The same work twice gives the same bytes: every registered method, its checkpoint and its ONNX file."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import r2cli
from r2cli import registry
from r2cli.storage import checkpoint


def tiny() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 10)]
    return nn.Sequential(*layers).eval()


def trained(method: str) -> bytes:
    config = r2cli.PretrainConfig(reg=method, epochs=1, batch_size=32)
    return checkpoint.to_bytes(r2cli.pretrain(tiny(), r2cli.load_data("digits:64", size=8), config).checkpoint)


def quantized(method: str) -> bytes:
    config = r2cli.PtqConfig(method=method, weight_bits=4, calibration=32)
    result = r2cli.quantize(tiny(), r2cli.load_data("digits:64", size=8), config)
    return result.to_bytes() + r2cli.export(result)


def finetuned(method: str) -> bytes:
    config = r2cli.QatConfig(method=method, weight_bits=4, act_bits=4, epochs=1, batch_size=32, calibration=32)
    result = r2cli.finetune(tiny(), r2cli.load_data("digits:64", size=8), config)
    return result.to_bytes() + r2cli.export(result)


def palettized(method: str) -> bytes:
    training: dict[str, Any] = {} if method == "kmeans" else {"epochs": 1, "hard_epochs": 0, "batch_size": 32}
    config = r2cli.PalettizeConfig(method=method, bits=2, dim=2, calibration=32, **training)
    result = r2cli.palettize(tiny(), r2cli.load_data("digits:64", size=8), config)
    return result.to_bytes() + r2cli.export(result)


WORK = [
    *((trained, method) for method in registry.REGULARIZERS),
    *((quantized, method) for method in registry.PTQ_METHODS),
    *((finetuned, method) for method in registry.QAT_METHODS),
    *((palettized, method) for method in registry.PALETTE_METHODS),
]
QUICK = ("linf", "margin", "soft-minmax", "kure", "clip", "none", "dkm")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "method"), [pytest.param(*each, marks=[pytest.mark.slow] * (each[1] not in QUICK)) for each in WORK]
)
def test_the_same_twice_is_the_same_bytes(work: Callable[[str], bytes], method: str, one_thread: None) -> None:
    first = work(method)
    torch.manual_seed(99)  # what ran before must not matter
    torch.rand(3)
    assert work(method) == first and len(first) > 1000
