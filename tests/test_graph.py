"""The graph reader: BatchNorm folding, the places of grids, what passes values on."""

import pytest
import torch
from torch import Tensor, nn

from r2cli import models
from r2cli.errors import InputError
from r2cli.graph import batchnorm, edit, placement, structure
from r2cli.graph.read import trace


def _warm(model: nn.Module, channels: int, size: int) -> nn.Module:
    """Statistics and affine parameters as after training, a third of the gammas negative."""
    torch.manual_seed(0)
    model.train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.normal_(0.5, 1.0)
                module.bias.normal_()
        for _ in range(3):
            model(torch.randn(8, channels, size, size))
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "resnet8", "resnet18"])
def test_folding_keeps_the_function(name: str) -> None:
    model = _warm(models.build(models.spec(name, classes=10, channels=3, size=16, width=None)), 3, 16)
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        before = model(images)
        net = trace(model, images)
        factors = batchnorm.remove_norms(net)
        for layer, factor in factors.items():
            weight = structure.weight_of(net.get_submodule(layer))
            weight.mul_(factor.float().reshape(-1, *[1] * (weight.ndim - 1)))
        after = net(images)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    assert all(bool((factor >= 0).all()) for factor in factors.values())
    # Float32 sums in another order, through up to 53 layers.
    assert torch.allclose(before, after, atol=1e-4 * float(before.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d])
def test_statistics_are_those_of_all_values_also_where_the_last_batch_is_short(kind: type[nn.Module]) -> None:
    norm, shape = kind(2), (65, 2) if kind is nn.BatchNorm1d else (65, 2, 4, 4)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 1, 2).view(
        2, *(1,) * (len(shape) - 2)
    )
    x[64:] += 30
    batchnorm.reestimate_norms(norm, [x[:60], x[60:64], x[64:]])
    # A channel's only value has no variance, and is not counted.
    counted = [x[:60], x[60:64], *([x[64:]] if len(shape) == 4 else [])]
    share = torch.tensor([len(part) for part in counted]) / sum(map(len, counted))
    dims = [place for place in range(len(shape)) if place != 1]
    mean = (torch.stack([part.mean(dims) for part in counted]) * share[:, None]).sum(0)
    variance = (torch.stack([part.var(dims) for part in counted]) * share[:, None]).sum(0)
    assert torch.allclose(norm.get_buffer("running_mean"), mean, atol=1e-5)
    assert torch.allclose(norm.get_buffer("running_var"), variance, rtol=1e-4)
    assert not norm.training and norm.momentum == 0.1
    before = norm.get_buffer("running_mean").clone()
    if len(shape) == 2:  # nothing to collect: what was there stays
        batchnorm.reestimate_norms(norm, [x[:1]])
        assert torch.equal(norm.get_buffer("running_mean"), before)


def test_parameter_names_stay_when_the_graph_is_read() -> None:
    model = models.build(models.spec("resnet18", classes=10, channels=3, size=32, width=None))
    net = trace(model, torch.zeros(2, 3, 32, 32))
    assert net.state_dict().keys() == model.state_dict().keys()
    own = dict(net.named_parameters())
    assert own.keys() == dict(model.named_parameters()).keys()
    assert all(own[name] is parameter for name, parameter in model.named_parameters())


@pytest.mark.slow
def test_grids_stand_on_what_computes_and_not_on_the_logits() -> None:
    model = models.build(models.spec("resnet8", classes=10, channels=1, size=8, width=None))
    net = trace(model, torch.zeros(2, 1, 8, 8))
    batchnorm.remove_norms(net)
    assert placement.values(net, (1, 8, 8)) == [
        *["x", "relu", "stages_0_0_relu1", "stages_0_0_conv2", "stages_0_0_relu2"],
        *["stages_1_0_relu1", "stages_1_0_conv2", "stages_1_0_shortcut_0", "stages_1_0_relu2"],
        *["stages_2_0_relu1", "stages_2_0_conv2", "stages_2_0_shortcut_0", "stages_2_0_relu2", "pool"],
    ]


@pytest.mark.slow
def test_a_shared_relu_is_two_places() -> None:
    model = models.build(models.spec("resnet18", classes=10, channels=3, size=32, width=None))
    net = trace(model, torch.zeros(2, 3, 32, 32))
    batchnorm.remove_norms(net)
    names = placement.values(net, (3, 32, 32))
    assert "layer1_0_relu" in names and "layer1_0_relu_1" in names


class Odd(nn.Module):
    """A functional sum, a layer that runs twice, and a layer whose BatchNorm is read by someone else too."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.twice(self.twice(x))
        z = self.conv(y)
        return torch.add(self.norm(z), z)


def test_only_a_norm_that_alone_reads_its_layer_is_folded() -> None:
    net = trace(Odd(), torch.zeros(2, 3, 4, 4))
    assert [(layer.name, layer.norm) for layer in structure.layers(net)] == [("twice", None), ("conv", None)]
    assert batchnorm.remove_norms(net) == {}


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


def test_a_graph_that_cannot_be_read_is_refused_with_the_line_and_a_way_out() -> None:
    message = r"torch.export cannot read Branch .*test_graph.py line \d+: 'return x if float.*--act-bits none"
    with pytest.raises(InputError, match=message) as refused:
        trace(Branch(), torch.zeros(2, 3))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["code", "graph", "meta", "recompile"])
def test_a_part_with_a_name_that_graphs_have_is_to_be_renamed(name: str) -> None:
    model = nn.Sequential()
    model.add_module(name, nn.Linear(3, 3))
    with pytest.raises(InputError, match=f"cannot read Sequential: its '{name}' is called as .* give it another name"):
        trace(model, torch.zeros(2, 3))


class ByHand(nn.Module):
    """Shapes that are read on the way, as hand-written networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        assert x.dim() is not None
        x = torch.relu(self.norm(x))
        x = nn.functional.avg_pool2d(x, x.size()[3])
        return self.head(x.view(x.shape[0], -1))


def test_a_shape_that_is_read_is_no_value_on_a_grid() -> None:
    net = trace(ByHand(), torch.zeros(2, 3, 8, 8))
    assert [layer.norm for layer in structure.layers(net)] == ["norm", None]
    batchnorm.remove_norms(net)
    assert placement.values(net, (3, 8, 8)) == ["x", "relu", "avg_pool2d"]
    edit.insert(net, {name: nn.Identity() for name in ("x", "relu", "avg_pool2d")})
    edit.repeat_grids(net)
    on_grids = [node for node in net.graph.nodes if str(node.target).startswith(edit.GRIDS)]
    assert [str(node.args[0]) for node in on_grids] == ["x", "relu", "avg_pool2d", "flatten"]
    assert net(torch.zeros(2, 3, 8, 8)).shape == (2, 2)


# --- what torch.export reads ------------------------------------------------------------------------------------------


class _Branching(nn.Module):
    """Control flow on a size; a BatchNorm to fold, and a layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.again, self.drop, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Dropout(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 2:
            x = torch.relu(self.norm(self.conv(x)))
        for _ in range(x.shape[-1] // 4):
            x = x + self.again(x)
        logits: Tensor = self.head(self.drop(x.mean((2, 3))))
        return logits


def test_a_graph_has_the_networks_layers_and_takes_batches_of_any_size() -> None:
    model = _warm(_Branching(), 3, 8)
    net = trace(model, torch.zeros(2, 3, 8, 8))
    assert dict(net.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert all(net.get_parameter(name) is own for name, own in model.named_parameters())
    assert [(layer.name, layer.norm) for layer in structure.layers(net)] == [
        ("conv", "norm"),
        ("again", None),
        ("head", None),
    ]
    for count in (1, 5):  # not only the example's two
        images = torch.randn(count, 3, 8, 8)
        assert torch.equal(net(images), model(images))
    assert {"x", "relu", "add", "add_1"} <= set(placement.values(net, (3, 8, 8)))
