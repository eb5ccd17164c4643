"""Networks by name. `build(spec)` makes one with new random weights. A checkpoint records the spec.

    mobilenet_v1, resnet8 ... resnet110    r2's own
    resnet18, mobilenet_v2, vit_b_16 ...   every classification model of torchvision
    timm:NAME                              every model of timm, if it is installed
    mobilebert, text:DIR, text:HUB/NAME    sequence classifiers of transformers, if it is installed
    file.py:FACTORY, package.module:FACTORY    the user's own code, imported only when the command line names it

The stem is the first layer. An 'imagenet' stem is that of the paper. A 'small' stem, for images of at most 64 pixels,
has stride 1 and no pooling before the first block.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from r2cli.errors import InputError, unknown
from r2cli.models import onnx, own, signature, text, timm, torchvision
from r2cli.models.mobilenet_v1 import mobilenet_v1
from r2cli.models.resnet_cifar import resnet8, resnet20, resnet32, resnet44, resnet56, resnet110
from r2cli.storage.checkpoint import LOGITS, ModelSpec
from r2cli.storage.input_spec import InputSpec, NetworkInput, TensorsSpec, places
from r2cli.storage.keywords import is_own, require_safe

SMALL_IMAGE = 64  # pixels; larger images get the imagenet stem
STEMS = ("small", "imagenet")

MODELS: Mapping[str, Callable[[ModelSpec], nn.Module]] = {
    "mobilenet_v1": mobilenet_v1,
    "resnet8": resnet8,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "resnet110": resnet110,
}
HAS_WIDTH = ("mobilenet_v1", "mobilenet_v2")


def spec(
    name: str,
    *,
    classes: int,
    channels: int,
    size: int,
    width: float | None = None,
    stem: str | None = None,
    args: Mapping[str, Any] | None = None,
) -> ModelSpec:
    """Make the spec of a network for images of `channels` x `size` x `size`. Imports the user's code if `name` says so.

    Raises InputError for an unknown name, and for options that do not apply to the network.
    """
    if text.has(name):
        for option, value in (("--width", width), ("--stem", stem)):
            if value is not None:
                raise InputError(f"{option} does not apply to {name}: it reads text")
        family, config = text.architecture(name, args or {}, size)
        return ModelSpec(family, classes, channels, args=config)
    factory = own.factory(name) if is_own(name) else None
    if factory is None:
        _require_known(name)
    if width is not None and name not in HAS_WIDTH:
        raise InputError(f"--width does not apply to {name}: only {' and '.join(HAS_WIDTH)} have one")
    if width is not None and not 0 < width <= 4:
        raise InputError(f"--width {width:g} is out of range: give a factor above 0 and at most 4")
    if args and name in MODELS:
        raise InputError(f"--model-arg does not apply to {name}: it has no keywords of its own")
    if stem is not None and (factory or timm.has(name)):
        raise InputError(f"--stem does not apply to {name}: its own code says what its first layer is")
    if stem is not None and stem not in STEMS:
        raise unknown("--stem", stem, STEMS)
    default_stem = "small" if size <= SMALL_IMAGE and not factory and not timm.has(name) else "imagenet"
    default_width = 0.25 if name == "mobilenet_v1" else 1.0  # a quarter trains on two cores in half a minute
    width = default_width if width is None else width
    # Refused here already, or training would end in a checkpoint that no command may load.
    if factory is None:
        require_safe(name, args or {}, "--model-arg")
    label = own.label(name) if factory else name
    return ModelSpec(label, classes, channels, stem or default_stem, width, args or {}, factory)


def build(spec: ModelSpec, most: int | None = None) -> nn.Module:
    """Build the network of `spec` with new random weights: (batch, channels, size, size) to logits (batch, classes).

    Raises InputError for an unknown name, for the user's own code if the command line did not name it, for a factory
    that raises, wants other arguments, or returns no module, and for a network of more than `most` parameters.
    """
    if spec.factory is not None:
        return own.build(spec)
    if onnx.has(spec.name):
        return onnx.build(spec, most)
    if is_own(spec.name) and not text.has(spec.name):
        raise InputError(
            f"the network is made by {spec.name}, which is your own code and runs only when you name it: "
            f"give --model FILE.py:{spec.name.rpartition(':')[2]}"
        )
    if not text.has(spec.name):
        _require_known(spec.name)
    make = text.build if text.has(spec.name) else timm.build if timm.has(spec.name) else torchvision.build
    try:
        with _at_most(most, spec.name):
            return MODELS.get(spec.name, make)(spec)
    except InputError:
        raise
    except Exception as error:  # a library's factory raises anything for keywords that a file or a user gives
        why = "it takes more memory than there is" if "alloc" in str(error) else " ".join(str(error).split())[:300]
        raise InputError(f"{spec.name} cannot be made with {dict(spec.args)} ({why}): see its --model-arg") from error


@contextmanager
def _at_most(most: int | None, name: str) -> Iterator[None]:
    """Raise InputError, in the block, when modules have more than `most` parameters: before they are filled."""
    count = 0

    def add(module: nn.Module, own: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += max(1, parameter.numel()) if parameter is not None else 0
        if most is not None and count > most:
            raise InputError(f"{name} as the file describes it has more parameters than the file holds: write it again")

    hook = register_module_parameter_registration_hook(add)
    try:
        yield
    finally:
        hook.remove()


def input_names(spec: ModelSpec, given: NetworkInput) -> tuple[str, ...]:
    """What the inputs of a network are called in an ONNX file: as in the file that it came from, if it did."""
    return onnx.program(spec).inputs if onnx.has(spec.name) else given.names


def called(model: nn.Module, spec: ModelSpec, given: NetworkInput) -> nn.Module:
    """`model`, in place, called by place: `signature.by_place` for the user's own code, and for the user's own data."""
    if onnx.has(spec.name):  # it is already
        return model
    if isinstance(given, TensorsSpec) or (is_own(spec.name) and not text.has(spec.name)):
        return signature.by_place(model, given.names)
    return model


def told_of_batches(model: nn.Module) -> str:
    """What to say of a network whose result depends on the batch, by a BatchNorm without statistics; or ""."""
    norms = ((name, one) for name, one in model.named_modules() if isinstance(one, nn.modules.batchnorm._BatchNorm))
    name = next((name for name, norm in norms if norm.running_mean is None), None)
    depends = f"the BatchNorm '{name}' uses no running statistics, so what the network gives depends on the batch"
    return "" if name is None else f"{depends}: it cannot be quantized"


@torch.inference_mode()
def require_fit(
    model: nn.Module, spec: ModelSpec, given: NetworkInput, *, decides: bool = True
) -> tuple[NetworkInput, tuple[str, ...]]:
    """Run one sample of zeros through `model`, which becomes one that is called by place, in place.

    Returns the inputs with the network's names for them, and the names of its outputs. Raises InputError where the
    network does not take `given`, or where a metric `decides` among the classes of images and the first output has not
    `spec.classes` logits: better now than after the data has been read.
    """
    own_names = isinstance(given, TensorsSpec) and not onnx.has(spec.name)
    inputs = signature.named_inputs(model, given, spec.name) if own_names else given  # type: ignore[arg-type]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    needed = signature.needed(model)
    model = called(model.eval(), spec, inputs)
    blank = [one.to(device) for one in places(inputs.blank(1))]
    try:
        raw = model.raw(*blank) if isinstance(model, signature.ByPlace) else model(*blank)
    except Exception as error:
        why = " ".join(str(error).split())[:300]
        if len(needed) != len(blank):
            both = f": a batch is (inputs, target), so give (({', '.join(needed)}), target)" if len(needed) > 1 else ""
            raise InputError(
                f"{spec.name} reads {len(needed)} inputs ({', '.join(needed)}) and the data gives {inputs}{both}, or "
                "the data that it is for, as --data FILE.py:FACTORY"
            ) from error
        raise InputError(f"{spec.name} cannot take {inputs} ({why}): give another --size or --data") from error
    if not isinstance(raw, Tensor) and not isinstance(model, signature.ByPlace) and not onnx.has(spec.name):
        raise InputError(f"{spec.name} returns a {type(raw).__name__} and no tensor: name it as FILE.py:FACTORY")
    try:
        outputs = list(signature.named(raw))
    except InputError as error:
        raise InputError(f"{spec.name} gives {error}") from error
    if not outputs:
        raise InputError(f"{spec.name} gives no tensor: a network must give one at least")
    is_classifier = decides and spec.classes > 0 and isinstance(inputs, InputSpec)
    if is_classifier:
        _require_logits(outputs[0][1], spec)
    names = signature.apart([name for name, _ in outputs], inputs.names)
    return inputs, LOGITS if is_classifier and len(names) == 1 else names


def _require_logits(logits: Tensor, spec: ModelSpec) -> None:
    """Raises InputError where the first output of a classifier is not the logits of its classes."""
    if logits.ndim != 2 or logits.shape[1] == 1 < spec.classes:
        one = "one number" if logits.numel() == 1 else f"values of shape {tuple(logits.shape)[1:]}"
        pair = ", or write the logits of two classes, torch.cat([-x, x], 1)" if logits.numel() == 1 else ""
        raise InputError(
            f"{spec.name} gives {one} for an image: the data has {spec.classes} classes, so give the data that it is "
            f"for, or what is measured (--metric auroc, mse, or FILE.py:FUNCTION){pair}"
        )
    if tuple(logits.shape) != (1, spec.classes):
        raise InputError(
            f"{'the network' if onnx.has(spec.name) else spec.name} gives an image {logits.shape[1]} logits, the data "
            f"has {spec.classes} classes: give the names of all with --classes FILE, or calibrate on pictures without "
            f"labels, images:DIR{', or give a --model-arg that sets its classes' if is_own(spec.name) else ''}"
        )


def _require_known(name: str) -> None:
    if name not in MODELS and not timm.has(name) and name not in torchvision.names():
        raise unknown(
            "model", name, [*MODELS, *torchvision.names(), "timm:NAME", "mobilebert", "text:DIR", "file.py:FACTORY"]
        )
