"""Bits of activations that a layer asks for reach back through functions of one value, and stop at a sum of two."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r2cli.graph import placement
from r2cli.graph.read import trace
from r2cli.graph.structure import propagate


class Affine(nn.Module):
    """PP-LCNet's: a hard swish, times a number and plus one, before the next layer; then a sum, and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(2, 2, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        second = self.second(F.hardswish(first) * 1.3 + 0.2)
        return self.third(F.avg_pool2d(torch.sigmoid(first + second), 2))


def _bits(keep: dict[str, int]) -> dict[str, int]:
    net = trace(Affine(), torch.randn(2, 2, 4, 4))
    propagate(net, (2, 4, 4))
    return placement.bits_of(net, placement.values(net, (2, 4, 4)), 8, keep)


def _wide(keep: dict[str, int]) -> list[str]:
    return [name for name, bits in _bits(keep).items() if bits == 16]


def test_a_gate_and_a_product_by_a_number_have_the_bits_of_what_is_made_of_them() -> None:
    assert _wide({}) == []
    assert _wide({"second": 16}) == ["first", "hardsigmoid", "mul", "mul_1", "add"]


def test_a_mean_gives_more_levels_than_it_reads_and_a_sum_of_two_is_nobodys_function() -> None:
    assert _wide({"third": 16}) == ["avg_pool2d"]
    assert set(_bits({"second": 4}).values()) == {4, 8}
    assert [name for name, bits in _bits({"second": 4}).items() if bits == 4] == ["add"]
