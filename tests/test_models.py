"""Networks: the papers' parameter counts, the sizes of what flows through them, and names that do not exist."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import Forget
from r2cli import models
from r2cli.errors import InputError
from r2cli.storage.checkpoint import InputSpec, ModelSpec


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def sizes(model: nn.Module, shape: tuple[int, int, int], watched: list[str]) -> tuple[list[int], tuple[int, ...]]:
    """Height of the values that the `watched` modules give, and the shape of the logits, for two images of `shape`."""
    found: dict[str, int] = {}

    def watch(name: str) -> None:
        def seen(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            assert output.shape[2] == output.shape[3]
            found[name] = output.shape[2]

        model.get_submodule(name).register_forward_hook(seen)

    for name in watched:
        watch(name)
    with torch.no_grad():
        logits = model.eval()(torch.zeros(2, *shape))
    return [found[name] for name in watched], tuple(logits.shape)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "count"),
    [
        (ModelSpec("mobilenet_v1", 1000, width=0.25), 470_072),
        (ModelSpec("mobilenet_v1", 1000, width=0.5), 1_331_592),
        (ModelSpec("mobilenet_v1", 1000, width=1.0), 4_231_976),
        (ModelSpec("mobilenet_v2", 1000, width=0.25), 1_519_112),
        (ModelSpec("mobilenet_v2", 1000, width=0.5), 1_968_680),
        (ModelSpec("mobilenet_v2", 1000, width=1.0), 3_504_872),
        (ModelSpec("resnet18", 1000), 11_689_512),
        (ModelSpec("resnet8", 10, channels=1, stem="small"), 77_754),
        # A stem's stride has no parameters; ResNet-18's small one is 3x3 instead of 7x7: 64 * 3 * (49 - 9) fewer.
        (ModelSpec("mobilenet_v1", 1000, stem="small", width=0.25), 470_072),
        (ModelSpec("mobilenet_v2", 1000, stem="small"), 3_504_872),
        (ModelSpec("resnet18", 1000, stem="small"), 11_689_512 - 7_680),
        # Two blocks more a stage: 2 * (2 * 9 * c * c + 4 * c) for 16, 32 and 64 channels.
        (ModelSpec("resnet20", 10, channels=1, stem="small"), 77_754 + 194_432),
    ],
    ids=lambda value: f"{value.name} {value.stem} {value.width:g}" if isinstance(value, ModelSpec) else None,
)
def test_parameter_counts(spec: ModelSpec, count: int) -> None:
    assert parameters(models.build(spec)) == count


V1 = ["stem", "blocks.0", "blocks.1", "blocks.3", "blocks.5", "blocks.12"]
V2 = ["features.0", "features.2", "features.4", "features.7", "features.18"]
RESNET18 = ["conv1", "maxpool", "layer1", "layer2", "layer3", "layer4"]
CIFAR = ["conv", "stages.0", "stages.1", "stages.2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stem", "size", "watched", "expected"),
    [
        ("mobilenet_v1", "small", 32, V1, [32, 32, 16, 8, 4, 2]),
        ("mobilenet_v1", "imagenet", 224, V1, [112, 112, 56, 28, 14, 7]),
        ("mobilenet_v2", "small", 32, V2, [32, 16, 8, 4, 2]),
        ("mobilenet_v2", "imagenet", 224, V2, [112, 56, 28, 14, 7]),
        ("resnet18", "small", 32, RESNET18, [32, 32, 32, 16, 8, 4]),
        ("resnet18", "imagenet", 224, RESNET18, [112, 56, 56, 28, 14, 7]),
        ("resnet8", "small", 32, CIFAR, [32, 32, 16, 8]),
        ("resnet8", "imagenet", 96, CIFAR, [48, 48, 24, 12]),
    ],
)
def test_sizes_of_what_flows(name: str, stem: str, size: int, watched: list[str], expected: list[int]) -> None:
    model = models.build(ModelSpec(name, 7, 3, stem, width=0.25))
    assert sizes(model, (3, size, size), watched) == (expected, (2, 7))


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", models.MODELS)
def test_every_network_takes_images_of_any_channels(name: str, channels: int) -> None:
    for size in (16, 96):  # on either side of the small stem
        spec = models.spec(name, classes=5, channels=channels, size=size, width=None)
        assert sizes(models.build(spec), (channels, size, size), [])[1] == (2, 5)


@pytest.mark.parametrize(("size", "stem"), [(8, "small"), (64, "small"), (65, "imagenet"), (224, "imagenet")])
def test_the_image_chooses_the_stem(size: int, stem: str) -> None:
    assert models.spec("resnet18", classes=2, channels=3, size=size, width=None).stem == stem


@pytest.mark.parametrize(
    ("name", "width", "expected"),
    [("mobilenet_v1", None, 0.25), ("mobilenet_v2", None, 1.0), ("mobilenet_v1", 1.0, 1.0), ("resnet8", None, 1.0)],
)
def test_widths(name: str, width: float | None, expected: float) -> None:
    assert models.spec(name, classes=2, channels=3, size=32, width=width).width == expected


@pytest.mark.parametrize(
    ("channels", "width", "expected"),
    # Multiples of 8, at least 8, not below 90 % of the exact number: 36 would go to 40, and 0.35 * 32 = 11.2 to 16.
    [(32, 0.25, 8), (1024, 0.25, 256), (32, 0.01, 8), (36, 1.0, 40), (32, 0.35, 16), (64, 0.75, 48), (128, 0.33, 40)],
)
def test_channels_are_multiples_of_eight(channels: int, width: float, expected: int) -> None:
    from r2cli.models.mobilenet_v1 import scaled

    assert scaled(channels, width) == expected


def test_a_seed_gives_the_same_weights() -> None:
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(models.build(ModelSpec("mobilenet_v1", 10, 1, "small", 0.25)).state_dict())
    assert all(tensor.equal(made[1][name]) for name, tensor in made[0].items())
    assert not made[0]["stem.weight"].equal(made[2]["stem.weight"])


@pytest.mark.parametrize(
    ("name", "near"), [("mobilenetv1", "mobilenet_v1"), ("resnet-18", "resnet18"), ("ResNet20", "resnet20")]
)
def test_an_unknown_network_suggests_the_nearest(name: str, near: str) -> None:
    with pytest.raises(InputError) as caught:
        models.spec(name, classes=2, channels=3, size=32, width=None)
    assert f"'{name}'" in str(caught.value) and f"'{near}'" in str(caught.value)
    with pytest.raises(InputError, match=f"'{near}'"):
        models.build(ModelSpec(name, 2))


def test_a_width_that_no_network_has_is_refused() -> None:
    for name, width in [("resnet8", 0.5), ("resnet18", 1.0), ("resnet20", 2.0)]:
        with pytest.raises(InputError, match=name) as caught:
            models.spec(name, classes=2, channels=3, size=32, width=width)
        assert caught.value.exit_code == 2
    for width in (0.0, -1.0, 4.5, float("nan"), float("inf")):
        with pytest.raises(InputError, match="--width"):
            models.spec("mobilenet_v1", classes=2, channels=3, size=32, width=width)


# --- torchvision's and timm's ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(
            ("alexnet", 224),
            ("densenet121", 32),
            ("efficientnet_b0", 32),
            ("googlenet", 32),
            ("mobilenet_v3_small", 32),
        ),
        *(("regnet_y_400mf", 32), ("shufflenet_v2_x0_5", 32), ("squeezenet1_1", 32), ("vgg11", 32), ("resnet50", 16)),
        *(("convnext_tiny", 64), ("swin_t", 64), ("vit_b_32", 224), ("mnasnet0_5", 32)),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.filterwarnings("ignore::UserWarning:torchvision.*")
def test_torchvision_s_networks_by_name(name: str, size: int, channels: int) -> None:
    spec = models.spec(name, classes=5, channels=channels, size=size)
    model = models.build(spec)
    models.require_fit(model, spec, image(channels, size))
    out = model.train()(torch.zeros(2, channels, size, size))
    assert isinstance(out, torch.Tensor) and out.shape == (2, 5), "no second head in training"


@pytest.mark.slow
def test_the_small_stem_of_any_network_has_stride_one() -> None:
    def first(size: int, stem: str | None = None) -> nn.Conv2d:
        model = models.build(models.spec("efficientnet_b0", classes=2, channels=3, size=size, stem=stem))
        return next(module for module in model.modules() if isinstance(module, nn.Conv2d))

    assert first(64).stride == (1, 1) and first(65).stride == (2, 2)
    assert first(64, "imagenet").stride == (2, 2) and first(224, "small").stride == (1, 1)


def test_keywords_reach_the_factory() -> None:
    spec = models.spec("mobilenet_v3_small", classes=3, channels=3, size=224, args={"dropout": 0.5, "width_mult": 0.5})
    model = models.build(spec)
    assert parameters(model) < 1_000_000 and any(m.p == 0.5 for m in model.modules() if isinstance(m, nn.Dropout))
    with pytest.raises(InputError, match="mobilenet_v2 cannot be made with .*depth"):
        models.build(models.spec("mobilenet_v2", classes=3, channels=3, size=32, args={"depth": 3}))
    with pytest.raises(InputError, match="--model-arg does not apply to resnet20"):
        models.spec("resnet20", classes=3, channels=3, size=32, args={"depth": 3})


@pytest.mark.slow
def test_an_image_that_a_network_cannot_take_is_refused_with_its_reason() -> None:
    for name, size, stem in (("alexnet", 32, "imagenet"), ("vit_b_16", 32, None)):
        spec = models.spec(name, classes=5, channels=3, size=size, stem=stem)
        with pytest.raises(InputError, match=rf"{name} cannot take images of 3x{size}x{size} .*--size"):
            models.require_fit(models.build(spec), spec, image(3, size))


def image(channels: int, size: int) -> InputSpec:
    return InputSpec(channels, size, size, (0.5,) * channels, (0.25,) * channels)


class Gives(nn.Module):
    def __init__(self, give: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.give = give

    def forward(self, x: Tensor) -> Any:
        return self.give(x.mean((2, 3)))


class Stereo(nn.Module):
    def forward(self, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        return (left + scale * right).mean((2, 3))


OTHERS: dict[str, tuple[nn.Module, str]] = {
    "one number": (Gives(lambda x: x[:, :1]), "gives one number for an image: .*, or write the logits of two classes"),
    "a map": (Gives(lambda x: x[:, :, None, None]), r"gives values of shape \(3, 1, 1\) for an image: "),
    "a text": (Gives(lambda x: (x, "two")), "gives a str as '1': it must give tensors, "),
    "nothing": (Gives(lambda x: None), "gives no tensor: "),
    "two inputs": (Stereo(), r"reads 2 inputs \(left, right\) and the data gives images of 3x8x8: "),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_network_that_is_no_classifier_of_the_data_is_told_why(kind: str) -> None:
    model, why = OTHERS[kind]
    spec = ModelSpec("net.py:net", 3)
    with pytest.raises(InputError, match=f"net.py:net {why}") as told:
        models.require_fit(model, spec, image(3, 8))
    assert "--size" not in str(told.value)


@pytest.mark.slow
def test_timm_s_networks_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    spec = models.spec("timm:resnet10t", classes=5, channels=1, size=32)
    model = models.build(spec)
    models.require_fit(model, spec, image(1, 32))
    assert type(model) is type(timm.create_model("resnet10t"))
    with pytest.raises(InputError, match="'resnet10t'"):
        models.build(models.spec("timm:resnet10", classes=5, channels=1, size=32))


def test_timm_is_asked_for_where_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install timm"):
        models.build(models.spec("timm:resnet10t", classes=5, channels=1, size=32))


# --- the user's own ---------------------------------------------------------------------------------------------------

NET = """
from torch import nn
from beside import HIDDEN

def small(num_classes=10, hidden=HIDDEN):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))

class Wide(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(192, 4))

def needs(depth, kind): ...
def raises(): raise ValueError("not today")
def nothing(): return {"conv": 1}
two = lambda: nn.Identity()
NUMBER = 3
"""


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget_modules: Forget) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside.py").write_text("HIDDEN = 16\n")
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").write_text("")
    (tmp_path / "own_package" / "nets.py").write_text("from torch import nn\ndef flat(): return nn.Flatten()\n")
    forget_modules("net", "beside", "own_package")
    return tmp_path / "net.py"


def own(name: str, **args: object) -> ModelSpec:
    return models.spec(name, classes=4, channels=3, size=8, args=args)


def test_a_factory_in_a_file(net: Path) -> None:
    for where in (str(net), "net.py"):
        spec = own(f"{where}:small", hidden=32)
        assert spec.name == "net.py:small", "no folder of this machine in a checkpoint"
        model = models.build(spec)
        assert parameters(model) == 192 * 32 + 32 + 32 * 4 + 4
        models.require_fit(model, spec, image(3, 8))
    assert isinstance(models.build(own("net.py:Wide")), nn.Sequential)
    assert isinstance(models.build(own("own_package.nets:flat")), nn.Flatten)


def test_a_file_never_names_code_that_runs(net: Path) -> None:
    described = own("net.py:small").described()
    json.dumps(described)
    with pytest.raises(InputError, match="runs only when you name it: give --model"):
        models.build(ModelSpec(**described))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("net.py:needs", r"missing a required argument: 'depth'.*--model-arg"),
        ("net.py:raises", "net.py:raises raised ValueError: not today"),
        ("net.py:nothing", "returned an object of type dict: it must return"),
        ("net.py:smal", "did you mean 'small'"),
        ("net.py:NUMBER", "unknown factory in net.py 'NUMBER'"),
        ("none.py:small", "none.py does not exist"),
        ("own_package.none:flat", "own_package.none cannot be imported"),
    ],
)
def test_a_factory_that_is_of_no_use_is_refused(name: str, told: str, net: Path) -> None:
    with pytest.raises(InputError, match=told) as caught:
        models.build(own(name))
    assert caught.value.exit_code == 2


def test_other_keywords_than_a_factory_s_are_refused(net: Path) -> None:
    with pytest.raises(InputError, match=r"unexpected keyword argument 'depth'"):
        models.build(own("net.py:small", depth=3))


@pytest.mark.parametrize("content", ["def small(:", "import no_such_module", "1 / 0", "raise SystemExit(3)"])
def test_a_file_that_cannot_be_imported_is_named(content: str, net: Path) -> None:
    net.write_text(content)
    with pytest.raises(InputError, match=r"net.py cannot be imported \("):
        own("net.py:small")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "told"), [("net.py:two", r"values of shape \(3, 8, 8\)"), ("net.py:Wide", None)])
def test_logits_are_one_a_class(name: str, told: str | None, net: Path) -> None:
    spec = own(name)
    if told is None:
        models.require_fit(models.build(spec), spec, image(3, 8))
        spec = replace(spec, classes=7)
        told = "4 logits, the data has 7 classes"
    with pytest.raises(InputError, match=told):
        models.require_fit(models.build(spec), spec, image(3, 8))


def test_options_that_own_code_has_no_use_for_are_refused(net: Path) -> None:
    with pytest.raises(InputError, match="--stem"):
        models.spec("net.py:small", classes=4, channels=3, size=8, stem="small")
    with pytest.raises(InputError, match="--width"):
        models.spec("net.py:small", classes=4, channels=3, size=8, width=0.5)
