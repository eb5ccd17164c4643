"""Networks written in every way become one graph: the same function, over plain layers of the network's parameters."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from r2cli.graph import operators, structure
from r2cli.graph.functions import FUNCTIONS, OTHERS
from r2cli.graph.read import Unreadable, trace


class Padded(nn.Conv2d):
    """A convolution that pads for itself."""

    def __init__(self, pad: tuple[int, ...]) -> None:
        super().__init__(3, 4, 3)
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, self.pad), self.weight, self.bias)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias)


class NormAct(nn.BatchNorm2d):
    def __init__(self) -> None:
        super().__init__(4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)
        return self.act(x)


class Functional(nn.Module):
    """Parameters without modules: a convolution, and a product by a matrix as GPT-2's Conv1D has it."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.matrix = nn.Parameter(torch.randn(4, 3, 1, 1)), nn.Parameter(torch.randn(4, 5))
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel).mean((2, 3))
        return torch.addmm(self.bias, x, self.matrix)


class Masked(nn.Module):
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("mask", (torch.rand(4, 3, 3, 3) > 0.5).float())

    def forward(self, x: Tensor) -> Tensor:
        half = (self.conv.weight * self.mask).half().float()
        return F.conv2d(x, half, self.conv.bias)


class Shared(nn.Module):
    """One weight under two names, one module called twice, and one weight with another stride."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(self.first(x)))
        return F.conv2d(x, self.first.weight, self.first.bias, stride=2)


class Shapes(nn.Module):
    """Sizes that depend on the batch, windows, halves, an expanded parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        windows = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(n * h * w // 4, 4, c)
        first, second = windows.roll(1, 1).chunk(2, 1)
        tokens = torch.cat([first, second], 1).view(n, -1, c)
        tokens = torch.cat([self.token.expand(n, -1, -1), tokens[:, 1:-1]], 1)
        return tokens.flatten(1) + torch.arange(n, device=x.device).float().unsqueeze(1)


class Pieces(nn.Module):
    """Operations that have another form in a canonical graph."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(x) + F.hardswish(x) + F.hardtanh(x, 0, 6) + x.clamp(min=0) + F.glu(torch.cat([x, x], 1), 1)
        y = 1 - y + torch.rsub(x, y, alpha=2) + F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="nearest")
        y = y + F.interpolate(F.max_pool2d(x, 2), size=x.shape[2:], mode="bilinear", align_corners=True)
        y = y + F.adaptive_avg_pool2d(x, (4, 2)).repeat(1, 1, 2, 4) + F.adaptive_avg_pool2d(x, (3, 3)).mean()
        y = F.pixel_shuffle(torch.cat([y] * 4, 1), 2).squeeze().float().contiguous() + F.pad(x, (8, 0, 0, 8), value=1)
        return F.pad(y, (1, 1, 1, 1), mode="reflect").movedim(1, -1).select(-1, 0)


def _recurrent(kind: type[nn.Module]) -> nn.Module:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = kind(8, 5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            found, _ = self.cell(x.flatten(1, 2))
            return found[:, -1]

    return Recurrent()


class Product(nn.Module):
    """A product of the image's rows (n, 24, 8) and a weight of any shape."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.function, self.matrix = function, nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x.flatten(1, 2), self.matrix)


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Bilinear(8, 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(x.flatten(1, 2), x.flatten(1, 2).relu())


def _einsum(equation: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, weight: torch.einsum(equation, x, weight)


def _heads(equation: str) -> Callable[[Tensor, Tensor], Tensor]:
    """`equation` of (n, 24, 2 heads, 4) and a weight."""
    return lambda x, weight: torch.einsum(equation, x.unflatten(-1, (2, 4)), weight)


# By what it is called: the function of the rows and a weight, its shape, and the shape of the layer's.
PRODUCTS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "rows": (_einsum("bnd,de->bne"), (8, 5), (5, 8)),
    "columns": (_einsum("bnd,ed->bne"), (5, 8), (5, 8)),
    "implicit": (_einsum("bzd, da"), (8, 5), (5, 8)),
    "ellipsis": (_einsum("...d,dhe->...he"), (8, 2, 5), (10, 8)),
    "heads made": (_einsum("bnd,hde->bhne"), (2, 8, 5), (10, 8)),
    "heads joined": (_heads("bnhd,hde->bne"), (2, 4, 5), (5, 8)),
    "heads apart": (_heads("bnhd,hde->bnhe"), (2, 4, 5), (10, 4, 1)),
    "heads first": (_heads("bnhd,hde->hebn"), (2, 4, 5), (10, 4, 1)),
    "tokens": (_einsum("bnd,mn->bmd"), (5, 24), (5, 24)),
    "tokens of heads": (_heads("bnhd,hnm->bmhd"), (2, 24, 5), (10, 24, 1)),
    "one of each head": (_heads("bnhd,hd->bnh"), (2, 4), (2, 4, 1)),
    "vector": (torch.matmul, (8,), (1, 8)),
    "batched": (torch.matmul, (1, 8, 5), (5, 8)),
    "pairs": (lambda x, weight: x.unsqueeze(1) @ weight, (2, 8, 5), (10, 8)),
    "a matrix a token": (lambda x, weight: x.unsqueeze(2) @ weight, (24, 8, 5), (120, 8, 1)),
    "from the left": (lambda x, weight: weight @ x, (5, 24), (5, 24)),
    "bmm": (lambda x, weight: torch.bmm(x.transpose(0, 1), weight), (24, 8, 5), (120, 8, 1)),
    "a sum over tokens": (_einsum("bnd,de->be"), (8, 5), (5, 8)),
    "baddbmm": (lambda x, w: torch.baddbmm(x[:, 0, :1], x.transpose(0, 1), w, beta=2), (24, 8, 5), (120, 8, 1)),
    "addmm": (lambda x, w: torch.addmm(x[:, 1, :5], x[:, 0], w, alpha=0.5), (8, 5), (5, 8)),
    "tensordot": (lambda x, weight: torch.tensordot(x, weight, ([1, 2], [1, 0])), (8, 24, 5), (5, 192)),
}
MADE: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, ...]]]] = {
    "padded": (lambda: Padded((1, 1, 1, 1)), {"conv2d": (4, 3, 3, 3)}),
    "unevenly padded": (lambda: nn.Sequential(Padded((0, 1, 0, 1))), {"0": (4, 3, 3, 3)}),
    "same": (lambda: nn.Conv2d(3, 4, (3, 4), padding="same"), {"conv2d": (4, 3, 3, 4)}),
    "reflecting": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")),
        {"0": (4, 3, 3, 3)},
    ),
    "standardised": (lambda: nn.Sequential(Standardised(3, 4, 3)), {"0": (4, 3, 3, 3)}),
    "weight_norm": (lambda: nn.Sequential(weight_norm(nn.Conv2d(3, 4, 3))), {"0": (4, 3, 3, 3)}),
    "spectral_norm": (lambda: nn.Sequential(spectral_norm(nn.Conv2d(3, 4, 3))), {"0": (4, 3, 3, 3)}),
    "norm and activation": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), NormAct()), {"0": (4, 3, 3, 3)}),
    "functional": (Functional, {"kernel": (4, 3, 1, 1), "matrix": (5, 4)}),
    "masked": (Masked, {"conv": (4, 3, 3, 3)}),
    "shared": (Shared, {"first": (3, 3, 1, 1), "second": (3, 3, 1, 1), "conv2d": (3, 3, 1, 1)}),
    "shapes": (Shapes, {}),
    "pieces": (Pieces, {}),
    "shuffled": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.ChannelShuffle(2)), {"0": (4, 3, 1, 1)}),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3, 2, 1, 1), nn.PReLU(4), nn.Conv2d(4, 2, 1)),
        {"0": (4, 3, 3, 3), "2": (2, 4, 1, 1)},
    ),
    "other norms": (
        lambda: nn.Sequential(
            nn.GroupNorm(3, 3), nn.InstanceNorm2d(3, affine=True), nn.LayerNorm(8), nn.RMSNorm(8), nn.Linear(8, 2)
        ),
        {"4": (2, 8)},
    ),
    "bilinear": (Bilinear, {"pair_1": (40, 8)}),
    "lstm": (lambda: _recurrent(nn.LSTM), {"cell.weight_ih_l0": (20, 8), "cell.weight_hh_l0": (20, 5)}),
    "gru": (lambda: _recurrent(nn.GRU), {"cell.weight_ih_l0": (15, 8), "cell.weight_hh_l0": (15, 5)}),
}


def _read(make: Callable[[], nn.Module]) -> tuple[nn.Module, fx.GraphModule, Tensor]:
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(3, 3, 8, 8)
    return model, trace(model, x[:2]), x


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
@torch.no_grad()
def test_whatever_wrote_it_is_the_same_function_over_plain_layers(name: str) -> None:
    make, expected = MADE[name]
    model, net, x = _read(make)
    for count in (1, 3):
        torch.testing.assert_close(net(x[:count]), model(x[:count].clone()), rtol=1e-5, atol=1e-5)
    found = {layer.name: tuple(module.weight.shape) for layer, module in structure.named_layers(net)}
    assert found == expected
    plain = ("torch.nn.modules.conv", "torch.nn.modules.linear", "r2cli.graph.transposed", "r2cli.graph.recurrent")
    assert all(type(module).__module__ in plain for _, module in structure.named_layers(net))


@pytest.mark.parametrize("name", PRODUCTS)
@torch.no_grad()
def test_a_product_with_a_weight_of_any_shape_is_a_layer(name: str) -> None:
    function, shape, weight = PRODUCTS[name]
    model, net, x = _read(lambda: Product(function, *shape))
    for count in (1, 3):
        torch.testing.assert_close(net(x[:count]), model(x[:count]), rtol=1e-5, atol=1e-4)
    assert {layer.name: tuple(one.weight.shape) for layer, one in structure.named_layers(net)} == {"matrix": weight}
    functions = {node.target for node in net.graph.nodes if node.op == "call_function"}
    assert functions.isdisjoint({torch.matmul, torch.einsum, torch.tensordot, torch.baddbmm})


@torch.no_grad()
def test_a_product_without_a_sum_multiplies_element_by_element() -> None:
    model, net, x = _read(lambda: Product(_einsum("bnd,de->bedn"), 8, 5))
    torch.testing.assert_close(net(x), model(x))
    assert [node.target for node in net.graph.nodes if node.op == "call_function"][-1] is torch.mul


def test_a_product_with_a_weight_that_is_no_layer_is_refused() -> None:
    with pytest.raises(Unreadable, match="its einsum multiplies the weight 'matrix' with more than one tensor"):
        _read(lambda: Product(lambda x, weight: torch.einsum("bni,ij,bmj->bnm", x, weight, x), 8, 8))
    for equation in ("bnd,de->bn", "bnd,dd->bn"):
        with pytest.raises(Unreadable, match="its einsum with the weight 'matrix' is no layer"):
            _read(lambda: Product(_einsum(equation), 8, 8))  # noqa: B023


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("tracked", [False, True])
@torch.no_grad()
def test_an_instance_norm_is_a_norm_that_every_part_of_r2_knows(affine: bool, tracked: bool) -> None:
    """No call of F.instance_norm is left, which no file could hold."""

    def make() -> nn.Module:
        norm = nn.InstanceNorm2d(3, affine=affine, track_running_stats=tracked)
        for tensor in (*norm.parameters(), *(each for each in norm.buffers() if each.is_floating_point())):
            tensor.uniform_(0.5, 1.5)
        return nn.Sequential(norm, nn.Conv2d(3, 4, 3))

    model, net, x = _read(make)
    torch.testing.assert_close(net(x), model(x), rtol=1e-5, atol=1e-5)
    norm = net.get_submodule("0")
    assert isinstance(norm, nn.BatchNorm2d if tracked else nn.GroupNorm)
    assert all(node.op != "call_function" for node in net.graph.nodes)


def test_parameters_are_the_networks_own_and_computed_ones_are_new() -> None:
    model, net, _ = _read(Shared)
    own = dict(model.named_parameters())
    assert net.get_parameter("first.weight") is own["first.weight"] is net.get_parameter("second.weight")
    assert net.get_parameter("conv2d.weight") is own["first.weight"]
    assert sum(node.target == "first" for node in net.graph.nodes) == 2
    model, net, _ = _read(Masked)
    assert net.get_parameter("conv.bias") is model.get_parameter("conv.bias")
    weight = net.get_parameter("conv.weight")
    assert weight.requires_grad and not weight.detach()[model.get_buffer("mask") == 0].any()


def test_a_padding_in_front_is_the_convolutions_own_where_it_is_even() -> None:
    _, net, _ = _read(lambda: Padded((2, 2, 1, 1)))
    assert net.get_submodule("conv2d").padding == (1, 2) and len(net.graph.nodes) == 3
    _, net, _ = _read(lambda: Padded((0, 1, 0, 1)))
    assert net.get_submodule("conv2d").padding == (0, 0)
    assert [node.target for node in net.graph.nodes if node.op == "call_function"] == [F.pad]


def test_a_batchnorm_of_another_class_is_folded_like_any() -> None:
    model, net, _ = _read(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), NormAct()))
    assert [(layer.name, layer.norm) for layer in structure.layers(net)] == [("0", "1")]
    assert type(net.get_submodule("1")) is nn.BatchNorm2d and net.state_dict().keys() == model.state_dict().keys()
    assert [node.name for node in net.graph.nodes][1:-1] == ["_0", "_1", "_1_act"]


@pytest.mark.slow
def test_sizes_are_numbers_but_for_the_batch() -> None:
    _, net, _ = _read(Shapes)
    shapes = [node.args[1] for node in net.graph.nodes if node.target is torch.reshape]
    assert shapes == [(-1, 3, 4, 2, 4, 2), (-1, 4, 3), (-1, 64, 3)]
    assert not [node for node in net.graph.nodes if "aten" in str(node.target) and "slice" not in str(node.target)]


@pytest.mark.slow
def test_adaptive_pools_are_average_pools_where_they_can_be() -> None:
    _, net, _ = _read(Pieces)
    pools = [node.args[1:] for node in net.graph.nodes if node.target is F.avg_pool2d]
    assert ((2, 4), (2, 4), (0, 0), False, True, None) in pools
    kinds = [operators.kind(net, node) for node in net.graph.nodes if node.target is F.adaptive_avg_pool2d]
    assert kinds == [operators.Kind.FLOAT]


class SharedNorms(nn.Module):
    """One tensor is the bias of a norm and the weight of another, as exporters make one of equal tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.second.weight = self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_a_weight_with_the_name_of_another_module_s_bias_has_a_module_of_its_own() -> None:
    model, x = SharedNorms().eval(), torch.randn(3, 4)
    nn.init.normal_(model.first.bias)
    assert torch.allclose(trace(model, x)(x), model(x))


def test_every_function_has_a_row() -> None:
    known = {
        member.function if isinstance(member, operators.When) else member
        for row in operators.TABLE
        for member in row.members
    }
    assert {function for function, _ in FUNCTIONS.values()} | set(OTHERS) <= known


def test_what_has_no_canonical_form_is_refused() -> None:
    class Cast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return x @ x

    with pytest.raises(Unreadable, match="r2 cannot read Cast: it computes in another type by autocast"):
        trace(Cast(), torch.zeros(2, 3, 3))


def test_a_batch_s_size_that_became_a_number_is_named() -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.zeros(len(x), 3)

    with pytest.raises(
        Unreadable, match=r"makes the batch's size a number: write x.shape\[0\] in the place of len\(x\)"
    ):
        trace(Counts(), torch.zeros(2, 3))
