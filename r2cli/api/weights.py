"""Weights from elsewhere, in a network by name or of the user's own: a file's, or those that are published."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from r2cli import data as datasets
from r2cli import models
from r2cli.api.data_notes import told_of_beside
from r2cli.config.groups import Inputs, NewNetwork, Preparation
from r2cli.errors import InputError
from r2cli.models import pretrained, text, timm
from r2cli.storage import checkpoint, foreign
from r2cli.storage.keywords import is_own
from r2cli.storage.own_code import keywords

PRETRAINED = Path("pretrained")  # how a history and messages name published weights
IMAGENET = 1000  # classes that are assumed of a network by name, before its weights are looked at


def model_spec(
    given: Preparation, name: str, source: datasets.Data, width: float | None = None, classes: int = 0
) -> checkpoint.ModelSpec:
    """The spec of network `name` for the images of `source`, with the keywords of `given`; of `classes` where the data
    has none.

    Raises InputError as `models.spec` does, and for pre-trained weights of other classes than those of `source`.
    """
    if given.pretrained and given.weights is not None:
        raise InputError(f"--weights {given.weights} and --pretrained are two networks: give one of them")
    known = pretrained.published(name).classes if given.pretrained else None
    if known is not None and source.classes and known != source.classes:
        raise InputError(
            f"the pre-trained {name} tells {known} classes apart and {source.name} has {source.classes}: give "
            "--data with its classes, or the names of all with --classes FILE"
        )
    return models.spec(
        name,
        classes=source.classes or known or classes,
        channels=source.input.channels,
        size=source.input.size,
        width=width,
        stem=given.stem or ("imagenet" if given.pretrained and not timm.has(name) else None),
        args=keywords(given.model_arg, "--model-arg"),
    )


def imported(given: Inputs, name: str, loaded: datasets.Data, *, tell: Callable[[str], None]) -> checkpoint.Checkpoint:
    """The checkpoint of network `name` with the weights that `given` names, for the inputs of `loaded`.

    Raises InputError as `model_spec` does, where the network does not take those inputs, and where the weights are
    missing, damaged or another network's.
    """
    spec = model_spec(given, name, loaded, classes=0 if is_own(name) else IMAGENET)
    network = models.build(spec)
    held = None if given.weights is None else foreign.read(given.weights, tell)
    classes = _classes_of(held, given, spec, network, loaded)
    if classes != spec.classes:
        spec = replace(spec, classes=classes)
        network = models.build(spec)
    taken, outputs = models.require_fit(network, spec, loaded.input, decides=loaded.task.decides)
    state, beside = _fitted(held, given, spec, network)
    if beside:
        tell(told_of_beside(given.weights or PRETRAINED, beside))
    origin, file = (str(given.weights), given.weights.name) if given.weights else (spec.name, PRETRAINED.name)
    made = checkpoint.Checkpoint(spec, taken, loaded.class_names, state, origin=origin, outputs=outputs)
    options = {"data": datasets.recorded(given.data or datasets.NOISE), "weights": file, "model": spec.described()}
    return made.then("import", options, {})


def _classes_of(
    held: Mapping[str, Tensor] | None,
    given: Preparation,
    spec: checkpoint.ModelSpec,
    network: nn.Module,
    loaded: datasets.Data,
) -> int:
    """How many classes the network of `spec` tells apart: what the weights `held` say, where it is one by name.

    Raises InputError where the data has others.
    """
    if held is None or is_own(spec.name) or not spec.classes:
        return spec.classes
    classes = foreign.classes_in(held, str(given.weights), network, spec.classes)
    if loaded.classes and classes != loaded.classes:
        raise InputError(
            f"{given.weights} tells {classes} classes apart and {loaded.name} has {loaded.classes}: give the names of "
            "all with --classes FILE, or calibrate on pictures without labels, images:DIR"
        )
    return classes


def _fitted(
    held: Mapping[str, Tensor] | None, given: Preparation, spec: checkpoint.ModelSpec, network: nn.Module
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of `network`, and what stands beside: those `held` by the file that `given` names, or published."""
    if held is not None:
        return foreign.fitted(held, str(given.weights), network, spec.name)
    return foreign.matched(pretrained.weights(spec), network.state_dict(), "what is published", spec.name)


def start_from(
    network: nn.Module, given: NewNetwork, spec: checkpoint.ModelSpec, *, tell: Callable[[str], None]
) -> None:
    """Give a fresh `network` the weights that `given` names, in place: a file's, or a text model's pre-trained ones.

    Raises InputError where they do not fit.
    """
    if given.weights is not None or given.pretrained:
        held = None if given.weights is None else foreign.read(given.weights)
        tensors, beside = _fitted(held, given, spec, network)
        checkpoint.into(network, tensors)
        if beside:
            tell(told_of_beside(given.weights or PRETRAINED, beside))
    elif text.has(given.model):
        fresh = text.start(network, given.model)
        tell(f"weights of {given.model}; new are {', '.join(fresh) or 'none'}")
