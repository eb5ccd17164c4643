"""The export's table of operations beside the functions of a canonical graph, and operations that few networks have."""

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from r2cli.deploy import onnx_export, runtime
from r2cli.deploy.onnx_operators import OPERATORS
from r2cli.errors import R2Error
from r2cli.graph.functions import FUNCTIONS, OTHERS
from r2cli.graph.operators import SHAPES
from r2cli.storage.checkpoint import Checkpoint, InputSpec, ModelSpec

Function = Callable[[Tensor], Tensor]
# Operators without a row in FUNCTIONS, which a canonical graph has as torch.export does: those of `x & y` and `x | y`.
AS_THEY_ARE = {torch.ops.aten.__and__.Tensor, torch.ops.aten.__or__.Tensor}
REFUSED = {F.bilinear}  # of a weight that depends on the input; of a parameter it is a layer


def test_what_a_canonical_graph_holds_is_what_the_export_writes() -> None:
    canonical = {function for function, _ in FUNCTIONS.values()} | OTHERS.keys()
    assert OPERATORS.keys() - canonical == AS_THEY_ARE
    assert canonical - OPERATORS.keys() - set(SHAPES) == REFUSED
    assert OPERATORS.keys().isdisjoint(SHAPES)  # they give numbers, and no tensor


class Own(nn.Module):
    """`function` between a convolution and its result: of the first sample's numbers where it wants parameters."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 4, 3, padding=1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x)).flatten(1)


def _channels(x: Tensor) -> Tensor:
    """A number for each channel that depends on the input, and not on the size of the batch."""
    return x.detach().amax((0, 2, 3))


def _bilinear(x: Tensor) -> Tensor:
    rows = x.permute(0, 2, 3, 1)
    return F.bilinear(rows, rows, x[0, :, :4, :4])


WRITTEN: dict[str, Function] = {
    "celu": lambda x: F.celu(4 * x, 0.5),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "pixel_unshuffle of five axes": lambda x: F.pixel_unshuffle(x.unflatten(1, (2, 2)), 2),
    "group_norm": lambda x: F.group_norm(x, 2, _channels(x), _channels(-x)),
    "group_norm without a bias": lambda x: F.group_norm(x, 2, _channels(x)),
    "instance_norm": lambda x: F.instance_norm(x, weight=_channels(x), bias=_channels(-x)),
    "instance_norm of statistics": lambda x: F.instance_norm(
        x, _channels(x), _channels(x).exp(), use_input_stats=False
    ),
    "batch_norm": lambda x: F.batch_norm(x, _channels(x), _channels(x).exp(), _channels(-x), _channels(x)),
    "as often as the batch is large": lambda x: (
        x + torch.linspace(0, 1, 8).view(1, 1, 2, 4).repeat(x.shape[0], 1, 4, 2)
    ),
    "quotients of integers": lambda x: (
        (4 * x).int() / 7 + (4 * x).int() // 3 + torch.div((4 * x).int(), 3, rounding_mode="trunc")
    ),
    "integers and numbers": lambda x: torch.where(
        (4 * x).int() >= 1.5, 2 - (4 * x).int(), (9 * x).int().clamp(-3, 5) * 0.5
    ),
    "functions of integers": lambda x: (4 * x).int().abs().sqrt() + (4 * x).int().relu() + (4 * x).int().sum(1, True),
    "sums of booleans": lambda x: ((x > 0) + (x < -1)).long() + (x > 0) * 2 + ((x > 0) * (x < 1)).sum(1, True),
    "comparisons of booleans": lambda x: (
        torch.eq(x > 0, True).float() + ((x > 0) > (x < 1)) + torch.ne((4 * x).int(), 1)
    ),
    "rounded towards zero": lambda x: torch.div(x, 0.3, rounding_mode="trunc"),
    "attention that sees nothing": lambda x: F.scaled_dot_product_attention(
        x, x, x, x.flip(-1) > x.amax((2, 3), True) - 0.3
    ),
    "attention to nothing, by a sum": lambda x: F.scaled_dot_product_attention(
        x, x, x, torch.zeros_like(x).masked_fill(x < x.amax((2, 3), True) - 0.3, -torch.inf)
    ),
    "keys that queries share": lambda x: F.scaled_dot_product_attention(x, x[:, :2], x[:, 2:], enable_gqa=True),
    "both": lambda x: x * ((x > -0.1) & (x < 0.1)),
    "one of two": lambda x: x * ((x > 0.1) | (x < -0.1)),
}


def _made(make: Callable[[], nn.Module]) -> Checkpoint:
    torch.manual_seed(0)
    state = make().state_dict()
    spec, given = ModelSpec("own.py:make", 256, factory=make), InputSpec(3, 8, 8, (0.0,) * 3, (1.0,) * 3)
    return Checkpoint(spec, given, tuple(map(str, range(256))), state)


@pytest.mark.parametrize("name", WRITTEN)
@torch.no_grad()
def test_an_operation_that_few_networks_have_is_written(name: str, tmp_path: Path) -> None:
    made = _made(lambda: Own(WRITTEN[name]))
    content = onnx_export.to_bytes(made)
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
    model, images = Own(WRITTEN[name]).eval(), torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    model.load_state_dict(made.floats)
    (tmp_path / "net.onnx").write_bytes(content)
    torch.testing.assert_close(runtime.runner(tmp_path / "net.onnx")(images), model(images), rtol=1e-4, atol=1e-5)


class Masked(nn.Module):
    """Attention under a mask that is the network's own."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.conv, self.mask = nn.Conv2d(3, 4, 3, padding=1), nn.Buffer(mask)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return F.scaled_dot_product_attention(x, x, x, self.mask).flatten(1)


@pytest.mark.parametrize("empty", [False, True])
@torch.no_grad()
def test_a_constant_mask_is_looked_at_where_it_may_keep_a_query_from_all_keys(empty: bool, tmp_path: Path) -> None:
    mask = torch.ones(8, 8).tril() > 0
    mask[2] &= not empty
    made = _made(lambda: Masked(mask))
    content = onnx_export.to_bytes(made)
    (tmp_path / "net.onnx").write_bytes(content)
    assert ("ReduceMax" in {node.op_type for node in onnx.load_from_string(content).graph.node}) is empty
    model, images = Masked(mask).eval(), torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    model.load_state_dict(made.floats)
    torch.testing.assert_close(runtime.runner(tmp_path / "net.onnx")(images), model(images), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_works_on_the_bits_of_numbers_is_refused() -> None:
    with pytest.raises(R2Error, match="cannot be written as ONNX: it is of the bits of numbers"):
        onnx_export.to_bytes(_made(lambda: Own(lambda x: torch.bitwise_and((4 * x).int(), (x > 0).int()))))


@pytest.mark.parametrize("function", [_bilinear, torch.atan])
def test_what_has_no_form_is_refused_by_its_name(function: Function) -> None:
    with pytest.raises(R2Error, match=rf"'{function.__name__.strip('_')}' .* cannot be written as ONNX: r2 knows no"):
        onnx_export.to_bytes(_made(lambda: Own(function)))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x += torch.relu_(x.clone())
        return self.gate(x).flatten(1)


@torch.no_grad()
def test_a_network_that_is_a_graph_already_is_written_as_any_other(tmp_path: Path) -> None:
    """torchvision's feature extractors are such graphs, of modules and functions that no canonical graph has."""
    content = onnx_export.to_bytes(_made(lambda: fx.symbolic_trace(Gated())))
    torch.manual_seed(0)
    model, images = Gated().eval(), torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    (tmp_path / "net.onnx").write_bytes(content)
    torch.testing.assert_close(runtime.runner(tmp_path / "net.onnx")(images), model(images), rtol=1e-4, atol=1e-5)
