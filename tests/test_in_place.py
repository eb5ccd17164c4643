"""In-place operations whose input is read again: the graph keeps the network's function, or is refused by name."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r2cli.graph.read import Unreadable, trace

Operation = Callable[[Tensor], Tensor]


def _add(x: Tensor) -> Tensor:
    x += x.mean()
    return x


def _multiply(x: Tensor) -> Tensor:
    x *= 0.5
    return x


def _divide_and_subtract(x: Tensor) -> Tensor:
    x /= 2
    x -= 0.1
    return x


OPERATIONS: dict[str, Callable[[], Operation]] = {
    "hardswish": lambda: nn.Hardswish(inplace=True),
    "relu": lambda: nn.ReLU(inplace=True),
    "relu6": lambda: nn.ReLU6(inplace=True),
    "silu": lambda: nn.SiLU(inplace=True),
    "leaky_relu": lambda: nn.LeakyReLU(0.1, inplace=True),
    "relu_": lambda: F.relu_,
    "leaky_relu_": lambda: F.leaky_relu_,
    "functional silu": lambda: lambda x: F.silu(x, inplace=True),
    "functional relu6": lambda: lambda x: F.relu6(x, True),
    "add_": lambda: lambda x: x.add_(1.0),
    "mul_": lambda: lambda x: x.mul_(torch.sigmoid(x)),
    "+=": lambda: _add,
    "*=": lambda: _multiply,
    "/= and -=": lambda: _divide_and_subtract,
}


class Block(nn.Module):
    """The operation first, then a skip over what it read: the skip takes what it made."""

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self.stem, self.conv, self.operation = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), operation

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        kept = x.transpose(2, 3)
        y = self.conv(self.operation(x))
        return x + y + kept.mean((2, 3), keepdim=True) + kept


@pytest.mark.slow
@pytest.mark.parametrize("make", OPERATIONS.values(), ids=OPERATIONS)
@torch.no_grad()
def test_who_reads_the_memory_later_reads_the_new_value(make: Callable[[], Operation]) -> None:
    torch.manual_seed(0)
    model, images = Block(make()).eval(), torch.randn(2, 3, 8, 8)
    expected = model(images.clone())
    net = trace(model, images)
    assert torch.allclose(net(images), expected, rtol=0, atol=1e-6)
    assert torch.equal(model(images.clone()), expected)  # the network's own modules are as they were
    written = [
        node.name
        for node in net.graph.nodes
        if str(node.target).rstrip("'").endswith("_") or node.kwargs.get("inplace")
    ]
    assert not written and not any(getattr(module, "inplace", False) for module in net.modules())


class Parts(nn.Module):
    """A part of a value is written, the other part is read."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = (x * 2).chunk(2, 1)
        return torch.cat([F.relu_(first), first, second], 1)


class Whole(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        first, _ = x.chunk(2, 1)
        return torch.cat([F.relu_(first), x], 1)


def test_a_part_is_followed_and_the_whole_of_a_written_part_is_refused() -> None:
    x = torch.randn(2, 4)
    assert torch.equal(trace(Parts(), x)(x), Parts()(x))
    with pytest.raises(Unreadable, match="the in-place operation 'relu_' changes memory that 'cat'"):
        trace(Whole(), x)


def test_a_size_that_is_counted_up_is_a_number() -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            size = x.shape[1]
            more = size
            more += 1
            return x * size + more

    x = torch.randn(2, 3)
    assert torch.equal(trace(Counts(), x)(x), x * 3 + 4)
