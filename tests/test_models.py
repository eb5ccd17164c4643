"""Networks: the papers' parameter counts, the sizes of what flows through them, and names that do not exist."""

import pytest
import torch
from torch import Tensor, nn

from r2cli import models
from r2cli.checkpoint import ModelSpec
from r2cli.errors import InputError


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
