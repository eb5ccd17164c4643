"""A hard sigmoid between two grids is written as a sum: with any grid, and where its values lie between two codes."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import r2cli
from r2cli.calibration import deployed
from r2cli.data import own
from r2cli.deploy import comparison, runtime, verify
from r2cli.storage.checkpoint import Checkpoint

GATES = ("hardsigmoid", "hardsigmoid_1")


class Swishes(nn.Module):
    """Two hard swishes of one shape behind convolutions without biases: (n, 3, 6, 6) to (n, 4) scores."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 1, bias=False)
        self.head = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.second(F.hardswish(self.first(x))))
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


@cache
def _images() -> Tensor:
    return 4 * torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@cache
def _made() -> Checkpoint:
    torch.manual_seed(0)
    return r2cli.quantize(Swishes(), own.to_data("noise", ([(_images(), None)], [(_images(), None)]))).checkpoint


def _with_grids(scales: dict[str, float], zeros: dict[str, int]) -> Checkpoint:
    """The network with other scales and zero points of some of its values."""
    grids = dict(_made().activations)
    for name in {*scales, *zeros}:
        scale, zero = scales.get(name), zeros.get(name)
        grids[name] = replace(
            grids[name],
            scale=grids[name].scale if scale is None else torch.tensor(scale),
            zero_point=grids[name].zero_point if zero is None else torch.tensor(zero, dtype=torch.int32),
        )
    return replace(_made(), activations=grids)


@pytest.mark.parametrize("reaches", [0.02, 0.7, 1 / 1.0001, 1.0001, 1.003, 1.7, 4.0])
@pytest.mark.parametrize("zero", [0, 90, 255])
def test_a_gate_is_right_on_any_grid(reaches: float, zero: int, tmp_path: Path) -> None:
    made = _with_grids(dict.fromkeys(GATES, reaches / 255), dict.fromkeys(GATES, zero))
    path = tmp_path / "net.onnx"
    r2cli.export(made, path)
    proof = verify.prove(path, made, deployed.network(made), [(_images(), torch.zeros(16).long())])
    assert proof.passed, [check for check in proof.checks if not check.passed]


def test_a_gate_whose_values_lie_between_two_codes_is_known_from_another(tmp_path: Path) -> None:
    """At x = 0 a hard sigmoid is between the codes 127 and 128, and ONNX Runtime may choose either: on a coarse grid
    that is most of the value, and another gate may then have more codes in common with it."""
    made = _with_grids({"first": 6.0, "second": 6.0}, {"first": 100, "second": 100})
    path = tmp_path / "net.onnx"
    r2cli.export(made, path)
    file = runtime.inlined(onnx.load(path))
    network, images = deployed.network(made), _images()[:2]
    assert isinstance(network, fx.GraphModule)
    values = runtime.values(file, comparison.exposed(file), optimise=False)(images)
    first = next(each for each in comparison.roundings(file) if np.isclose(each.scale, 1 / 255))
    codes = (values[first.gives] * 255).round()
    between = (codes - 127.5).abs() < 1
    assert 0.5 < between.float().mean() < 1

    def same_graph(changed: Tensor) -> bool:
        optimised = {**values, first.gives: changed * first.scale}
        checks = comparison.between_grids(network, images, file, values, optimised)
        return {check.name: check.passed for check in checks}["same graph"]

    # The product x * hardsigmoid(x) is the same 0 of either code.
    assert same_graph(codes) and same_graph(torch.where(between, 255 - codes, codes))
    assert not same_graph(torch.where(between, codes - 2, codes))
    assert not same_graph(torch.where(between, codes, 255 - codes))
