"""What a command works on: a checkpoint of r2's, or a network and weights from elsewhere, with their data."""

import ast
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from r2cli import console, models
from r2cli import data as datasets
from r2cli.errors import InputError
from r2cli.models import own, text
from r2cli.storage import checkpoint, foreign
from r2cli.storage.keywords import is_own, require_safe


@dataclass(frozen=True)
class Images:
    """The options that say which images, and how they are prepared."""

    data: str | None
    directory: Path | None
    workers: int
    size: int | None = None
    mean: str | None = None
    std: str | None = None

    def load(self, default: str, spec: checkpoint.InputSpec | None = None, model: str | None = None) -> datasets.Data:
        """The data set, by `default` that one, with the preprocessing of `spec` or of these options; text by the
        tokenizer of `model`."""
        mean, std = numbers("--mean", self.mean), numbers("--std", self.std)
        more: dict[str, Any] = {"directory": self.directory, "workers": self.workers}
        if spec is not None:
            asked = {"--size": self.size, "--mean": mean, "--std": std}
            for option, value in asked.items():
                if value is not None:
                    raise InputError(f"{option} does not apply: the checkpoint says how its input is prepared")
            if self.data is None:
                return datasets.load_named_in_file(default, spec=spec, **more)
            return datasets.load(self.data, spec=spec, **more)
        tokenizer = datasets.pack_tokenizer(text.tokenizer(model)) if model and text.has(model) else None
        more |= {"tokenizer": tokenizer}
        return datasets.load(self.data or default, size=self.size, mean=mean, std=std, **more)


@dataclass(frozen=True)
class Network:
    """The options that name a network which r2 did not train."""

    model: str | None
    weights: Path | None
    args: Sequence[str] | None
    stem: str | None

    def spec(self, name: str, source: datasets.Data, width: float | None = None) -> checkpoint.ModelSpec:
        """The spec of network `name` for the images of `source`."""
        return models.spec(
            name,
            classes=len(source.class_names),
            channels=source.input.channels,
            size=source.input.size,
            width=width,
            stem=self.stem,
            args=arguments(self.args or []),
        )


CALIBRATION = 512  # training images that calibrate, where no number is given


def calibration(asked: int | None, loaded: datasets.Data) -> int:
    """How many training images calibrate. Raises InputError for more than there are."""
    there = len(loaded.train)
    if asked is not None and asked > there:
        raise InputError(f"--calibration {asked} is more than {loaded.name} has: give at most {there}")
    return min(CALIBRATION, there) if asked is None else asked


NOISE = "noise"  # the images of a network whose data is not there


def load(
    source: Path, network: Network, images: Images, *, needed: bool = True
) -> tuple[checkpoint.Checkpoint, datasets.Data]:
    """The checkpoint at `source` with its data; with --weights, those weights in the named network as a checkpoint.

    Where data is not `needed` and the checkpoint only says that it was a folder, images of noise stand in for it.
    Raises InputError for options that contradict each other, weights of another architecture, data of other classes.
    """
    if network.weights is not None:
        return _foreign(network, images)
    names_code = network.model is not None and is_own(network.model)
    for option, value in (("--model-arg", None if names_code else network.args), ("--stem", network.stem)):
        if value:
            raise InputError(f"{option} belongs to --weights: a checkpoint says how its network is made")
    made = checkpoint.load(source)
    if network.model is not None:
        made = _with_code(made, network.model, network.args)
    own = datasets.named_in(made.history, made.origin)
    if not needed and images.data is None and own == "imagefolder":
        spec = f"fake:{made.input.channels}x{made.input.size}x{made.input.size}:{len(made.class_names)}"
        return made, replace(datasets.load(spec, spec=made.input), name=NOISE)
    loaded = images.load(own, made.input)
    require_classes(made.origin, made.class_names, loaded)
    return made, loaded


def _foreign(network: Network, images: Images) -> tuple[checkpoint.Checkpoint, datasets.Data]:
    assert network.weights is not None
    if network.model is None:
        raise InputError(f"--weights {network.weights} needs its network: give --model NAME or --model FILE.py:FACTORY")
    if images.data is None:
        raise InputError(f"--weights {network.weights} needs the data it is for: give --data, as imagefolder:DIR")
    loaded = images.load(images.data, model=network.model)
    spec = network.spec(network.model, loaded)
    model = models.build(spec)
    models.require_fit(model, spec, loaded.input.shape)
    state, beside = foreign.load(network.weights, model, spec.name)
    tell_beside(network.weights, beside)
    made = checkpoint.Checkpoint(spec, loaded.input, loaded.class_names, state, origin=str(network.weights))
    options = {"data": datasets.recorded(images.data), "weights": network.weights.name, "model": spec.described()}
    return made.then("import", options, {}), loaded


def tell_beside(path: Path, beside: Sequence[str]) -> None:
    """Say what a file of weights holds that the network has no place for, and that it stays there."""
    if beside:
        named = ", ".join(beside[:3]) + (", …" if len(beside) > 3 else "")
        console.note(f"{path}: {len(beside)} tensors that stand beside the network were not used: {named}")


def _with_code(made: checkpoint.Checkpoint, name: str, args: Sequence[str] | None) -> checkpoint.Checkpoint:
    """`made` with the user's own factory, which its file only names, and with the keywords `args` or else its own."""
    if not is_own(made.model.name):
        raise InputError(f"{made.origin} is a checkpoint of {made.model.name}: --model belongs to --weights")
    if own.label(name) != made.model.name:
        raise InputError(f"{made.origin} was made by {made.model.name}, not by {name}: name that one with --model")
    if not args:
        require_safe(made.model.name, made.model.args, made.origin)
    keywords = arguments(args) if args else made.model.args
    return replace(made, model=replace(made.model, factory=own.factory(name), args=keywords))


def require_classes(origin: str, class_names: Sequence[str], loaded: datasets.Data) -> None:
    """Raises InputError where a data set's classes are not those, in that order, that the network tells apart."""
    if tuple(class_names) != loaded.class_names:
        pairs = itertools.zip_longest(class_names, loaded.class_names, fillvalue="nothing")
        own, other = next((own, other) for own, other in pairs if own != other)
        raise InputError(
            f"{loaded.name} has the class '{other}' where {origin} was trained on '{own}': give the data of its classes"
        )


def arguments(texts: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` options as keywords: numbers, True, False, None and lists as Python writes them, else text."""
    out = {}
    for given in texts:
        name, sign, value = given.partition("=")
        if not sign or not name.isidentifier():
            raise InputError(f"--model-arg {given} is not NAME=VALUE, for example --model-arg width_mult=0.5")
        try:
            out[name] = _plain(ast.literal_eval(value))
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            out[name] = value
    return out


def _plain(value: Any) -> Any:
    """`value` as JSON gives it back; ValueError for what JSON does not hold."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str | int | bool | None) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(value)


def numbers(option: str, text: str | None) -> list[float] | None:
    """Numbers with commas between them. Raises InputError for anything else."""
    if text is None:
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option} {text} is not one number or one a channel: give for example 0.5,0.5,0.5") from error
    if not all(map(math.isfinite, values)):
        raise InputError(f"{option} {text} is impossible: give finite numbers")
    return values
