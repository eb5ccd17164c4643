"""What the work is done on: a checkpoint of r2's, or a network and weights from elsewhere, with their data."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from r2cli import data as datasets
from r2cli import models
from r2cli.api import weights
from r2cli.api.data_notes import told_of_data
from r2cli.calibration import earlier
from r2cli.calibration.result import Result
from r2cli.config import values
from r2cli.config.groups import DEFAULT_SOURCE, AccuracyGate, Evaluation, Inputs, Preparation
from r2cli.data import classes as class_lists
from r2cli.data import losses, metrics
from r2cli.data import own as own_data
from r2cli.data.own_splits import of_sizes
from r2cli.deploy import as_read
from r2cli.deploy.runtime import UnrunnableError
from r2cli.errors import InputError
from r2cli.models import onnx, pretrained, signature, text
from r2cli.storage import checkpoint, finite, own_code
from r2cli.storage.input_spec import InputSpec, NetworkInput, TensorsSpec, forms
from r2cli.storage.keywords import is_own, require_safe
from r2cli.storage.own_code import keywords
from r2cli.train import loop
from r2cli.train.pretraining import Pretrained


def load_data(
    given: Preparation,
    name: str | None,
    *,
    default: str,
    spec: NetworkInput | None = None,
    model: str | None = None,
    known: tuple[str, ...] = (),
) -> datasets.Data:
    """The data set `name`, by default `default`, with the preprocessing of `spec` or of `given`; text by the tokenizer
    of `model`. `known` are the classes of a checkpoint's network, where --classes names no others.

    Raises InputError for preprocessing beside a checkpoint's own, for a class that --classes does not list, and as
    `data.load` does.
    """
    classes = known if given.classes is None else class_lists.read(given.classes)
    loaded = _by_name(given, name, default, spec, model, classes)
    if given.classes is not None:
        loaded = class_lists.numbered(loaded, classes, given.classes)
    return of_task(given, loaded)


def _by_name(
    given: Preparation,
    name: str | None,
    default: str,
    spec: NetworkInput | None,
    model: str | None,
    classes: tuple[str, ...],
) -> datasets.Data:
    mean, std, size = values.numbers("--mean", given.mean), values.numbers("--std", given.std), values.size(given.size)
    if given.pretrained and model is not None:
        usual = pretrained.published(model)
        mean, std, size = mean or list(usual.mean), std or list(usual.std), size or usual.size
    more: dict[str, Any] = {"directory": given.data_dir, "workers": given.workers, "classes": classes}
    if name is not None and own_code.is_code(name):
        return datasets.load_own(name, keywords(given.data_arg, "--data-arg"))
    if given.data_arg:
        raise InputError("--data-arg belongs to data of your own: give --data FILE.py:FACTORY")
    if spec is not None:
        for option, value in {"--size": size, "--mean": mean, "--std": std}.items():
            if value is not None:
                raise InputError(f"{option} does not apply: the checkpoint says how its input is prepared")
        if name is None:
            return datasets.load_named_in_file(default, spec=spec, **more)
        return datasets.load(name, spec=spec, **more)
    tokenizer = datasets.pack_tokenizer(text.tokenizer(model)) if model and text.has(model) else None
    return datasets.load(name or default, size=size, mean=mean, std=std, tokenizer=tokenizer, **more)


def of_task(given: Preparation, loaded: datasets.Data) -> datasets.Data:
    """`loaded` with the metric that `given` names, or else its own."""
    if given.metric is None:
        if given.metric_lower or given.metric_arg:
            raise InputError("--metric-lower and --metric-arg belong to --metric: give its name")
        return loaded
    return measured_as(loaded, metrics.named(given.metric, given.metric_arg, lower=given.metric_lower))


def measured_as(loaded: datasets.Data, metric: metrics.Metric) -> datasets.Data:
    """`loaded` with another metric, and the loss that goes with it."""
    task, usual = replace(loaded.task, metric=metric), losses.OF_METRIC.get(metric.name)
    if usual is not None:
        task = replace(task, loss=losses.LOSSES[usual], logits=usual == losses.CROSS_ENTROPY.name)
    return replace(loaded, task=task, measured=True)


PROVED = 64  # images that a file is proved on where accuracy is not measured


def load(
    given: Inputs, *, needed: bool = True, measures: bool = False, tell: Callable[[str], None] = lambda text: None
) -> tuple[checkpoint.Checkpoint, datasets.Data]:
    """The checkpoint that `given` names, with its data; with --weights, those weights in the named network.

    `tell` gets what the file of weights holds beside the network, and what is done with data that does not say what it
    is for. Where data is not `needed`, noise stands in for it: of what an ONNX file says that it takes, and of images
    where a checkpoint only says that its data was a folder. Work that `measures` takes a checkpoint's own data all the
    same. Raises InputError for options that contradict each other, weights of another architecture, and data of other
    classes.
    """
    of_onnx_file = given.source is not None and given.source.suffix == ".onnx"
    made, loaded = _load(given, tell, needed=needed or (measures and not of_onnx_file))
    for line in told_of_data(made.origin, made.input, loaded):
        tell(line)
    return made, loaded


def _load(given: Inputs, tell: Callable[[str], None], *, needed: bool) -> tuple[checkpoint.Checkpoint, datasets.Data]:
    """The network and the data of `load`."""
    if given.weights is not None or given.pretrained:
        return _foreign(given, tell)
    names_code = given.model is not None and is_own(given.model)
    for option, value in (("--model-arg", () if names_code else given.model_arg), ("--stem", given.stem)):
        if value:
            raise InputError(f"{option} belongs to --weights: a checkpoint says how its network is made")
    if given.model is not None and given.source is None and not (names_code and DEFAULT_SOURCE.exists()):
        other = "the checkpoint that has them" if names_code else "--pretrained for those that are published"
        raise InputError(f"--model {given.model} needs weights: give --weights FILE, or {other}")
    if given.source is not None and given.source.suffix == ".onnx":
        return _of_onnx(given, given.source, needed=needed, tell=tell)
    made = checkpoint.load(given.source or DEFAULT_SOURCE)
    if given.model is not None:
        made = _with_code(made, given.model, given.model_arg)
    made = earlier.by_todays_names(made)
    if given.input_shape:
        raise InputError(f"--input-shape does not apply: {made.origin} says what its inputs are")
    own = datasets.named_in(made.history, made.origin)
    if not needed and given.data is None and isinstance(made.input, TensorsSpec):
        return made, own_data.noise(made.input, datasets.NOISE)
    if not needed and given.data is None and own in ("imagefolder", "images"):
        assert isinstance(made.input, InputSpec)
        height, width = made.input.sides
        spec = f"fake:{made.input.channels}x{height}x{width}:{len(made.class_names)}"
        return made, replace(datasets.load(spec, spec=made.input), name=datasets.NOISE, measured=False)
    loaded = load_data(given, given.data, default=own, spec=made.input, known=made.class_names)
    if given.classes is not None and not made.class_names:
        made = replace(made, class_names=loaded.class_names)
    loaded = fitting(made.origin, made.input, made.class_names, loaded)
    _require_vocabulary(made, loaded)
    return made, _calibrating(given, made, loaded)


def _calibrating(given: Inputs, made: checkpoint.Checkpoint, loaded: datasets.Data) -> datasets.Data:
    """`loaded` with the data that --calibration-data names, if it does."""
    if given.calibration_data is None:
        return loaded
    plain = replace(given, size=None, mean=None, std=None, pretrained=False, metric=None, metric_lower=False)
    other = load_data(replace(plain, metric_arg=(), classes=None), given.calibration_data, default="", spec=made.input)
    if isinstance(other.input, TensorsSpec):
        other = replace(other, input=of_sizes(other.input, [shape for shape, _ in forms(made.input)]))
    other = fitting(made.origin, made.input, (), replace(other, class_names=()))
    return replace(loaded, calibration=other.train)


def measured_by(
    wanted: Evaluation, gates: AccuracyGate, loaded: datasets.Data, *, trains: bool = False
) -> datasets.Data:
    """`loaded` with those test images that are to be measured.

    Raises InputError for a gate of the accuracy where that is not measured, and for a command that `trains` without.
    """
    if trains and not wanted.eval:
        raise InputError(f"--no-eval is for work without training: give --eval-images {PROVED}")
    if wanted.eval_images is not None and not wanted.eval:
        raise InputError("--eval-images and --no-eval contradict each other: give one")
    if not wanted.eval:
        loaded = replace(datasets.with_test_images(loaded, PROVED), measured=False)
    elif wanted.eval_images is not None:
        loaded = datasets.with_test_images(loaded, wanted.eval_images)
    asked = (gates.min_accuracy, gates.min_metric, getattr(gates, "max_drop", None))
    if not loaded.measured and any(bound is not None for bound in asked):
        way_out = "leave out --no-eval" if not wanted.eval else "give --data, or --metric"
        raise InputError(f"--min-accuracy, --min-metric and --max-drop need data with labels or targets: {way_out}")
    metric = loaded.task.metric
    if gates.min_accuracy is not None and metric is not None and metric.name != "top1":
        raise InputError(f"--min-accuracy is the least top-1 and what is measured is {metric.label}: give --min-metric")
    if not wanted.eval and getattr(gates, "max_latency", None) is not None:
        raise InputError("--max-latency needs what --no-eval leaves out: give only one of them")
    return loaded


def _foreign(given: Inputs, tell: Callable[[str], None]) -> tuple[checkpoint.Checkpoint, datasets.Data]:
    option = "--pretrained" if given.weights is None else f"--weights {given.weights}"
    if given.model is None:
        raise InputError(f"{option} needs its network: give --model NAME or --model FILE.py:FACTORY")
    if given.data is None:
        loaded = _noise(given, option)
    else:
        loaded = load_data(given, given.data, default="", model=given.model)
    made = weights.imported(given, given.model, loaded, tell=tell)
    return made, _calibrating(given, made, loaded)


def _noise(given: Inputs, what: str) -> datasets.Data:
    """Noise of the shapes that --input-shape says. Raises InputError, naming `what` needs data, where it says none."""
    if not given.input_shape:
        raise InputError(f"{what} needs the data it is for: give --data, as imagefolder:DIR, or --input-shape")
    return own_data.noise(own_data.of_shapes(given.input_shape), datasets.NOISE)


def _of_onnx(
    given: Inputs, path: Path, *, needed: bool, tell: Callable[[str], None]
) -> tuple[checkpoint.Checkpoint, datasets.Data]:
    """The float network of an ONNX file, with the data and the preprocessing that `given` names."""
    if given.model is not None:
        raise InputError(f"--model {given.model} does not apply: {path} holds its own network")
    onnx.require_there(path)
    stated = None if needed or given.input_shape else onnx.stated(path)
    if given.data is None:
        loaded = _noise(given, str(path)) if stated is None else own_data.noise(stated, datasets.NOISE)
    else:
        sizes = onnx.given(path)[0].shape
        square = sizes[2] if len(sizes) == 4 and sizes[2] == sizes[3] else None
        of_images = not own_code.is_code(given.data) and not given.data.startswith("npz:")
        loaded = load_data(replace(given, size=given.size or square) if of_images else given, given.data, default="")
    made = of_onnx(path, loaded, tell=tell)
    return made, _calibrating(given, made, loaded)


def of_onnx(
    path: Path, loaded: datasets.Data, *, tell: Callable[[str], None] = lambda line: None
) -> checkpoint.Checkpoint:
    """The float checkpoint of the network in an ONNX file, for the inputs of `loaded`.

    It is compared with the file in ONNX Runtime; `tell` is told where that cannot run it. Raises InputError for a file
    that cannot be read, naming the node, and where it does not take those inputs; Misread where both differ.
    """
    spec, taken, tensors = onnx.read(path, loaded.input, loaded.classes)
    network = models.build(spec)
    finite.require(tensors, str(path), finite.OTHERS)
    checkpoint.into(network, tensors)
    taken, _ = models.require_fit(network, spec, taken, decides=loaded.task.decides)
    program = onnx.program(spec)
    names = signature.apart(program.outputs, models.input_names(spec, taken))
    try:
        as_read.require_same(path, network, taken, program)
    except UnrunnableError as error:
        tell(f"whether {path} is read as it is meant is not checked: {error}")
    made = checkpoint.Checkpoint(spec, taken, loaded.class_names, tensors, origin=str(path), outputs=names)
    options = {"data": datasets.recorded(loaded.name), "onnx": path.name}
    return made.then("import", options, {})


def new_network(given: Inputs, seed: int) -> tuple[checkpoint.Checkpoint, datasets.Data]:
    """A network of `given.model` that nobody has trained, with its data."""
    assert given.model is not None
    name = given.data or "digits"
    loaded = load_data(given, name, default=name, model=given.model)
    spec = weights.model_spec(given, given.model, loaded)
    loop.seed_everything(seed)
    model = models.build(spec)
    taken, outputs = models.require_fit(model, spec, loaded.input, decides=loaded.task.decides)
    made = checkpoint.Checkpoint(spec, taken, loaded.class_names, model.state_dict(), origin=spec.name, outputs=outputs)
    options = {"data": datasets.recorded(name), "model": spec.described()}
    return made.then("new", options, {}), loaded


def _with_code(made: checkpoint.Checkpoint, name: str, args: Sequence[str]) -> checkpoint.Checkpoint:
    """`made` with the user's own factory, which its file only names, and with the keywords `args` or else its own."""
    if not is_own(made.model.name):
        raise InputError(f"{made.origin} is a checkpoint of {made.model.name}: --model belongs to --weights")
    if own_code.label(name) != made.model.name:
        raise InputError(f"{made.origin} was made by {made.model.name}, not by {name}: name that one with --model")
    if not args:
        require_safe(made.model.name, made.model.args, made.origin)
    own = keywords(args, "--model-arg") if args else made.model.args
    return replace(made, model=replace(made.model, factory=own_code.factory(name), args=own))


def fitting(origin: str, wanted: NetworkInput, class_names: Sequence[str], loaded: datasets.Data) -> datasets.Data:
    """`loaded`, if it is data that the network of the file `origin` takes, which wants those inputs and classes.

    Raises InputError for inputs of other names, shapes or kinds, and for other classes.
    """
    found = loaded.input
    if isinstance(found, TensorsSpec) or isinstance(wanted, TensorsSpec):
        named = all(found.names) and len(found.names) > 1
        if forms(found) != forms(wanted) or (named and found.names != wanted.names):
            raise InputError(f"{loaded.name} holds {found} and {origin} takes {wanted}: give the data that it is for")
    if loaded.class_names:
        require_classes(origin, class_names, loaded)
    elif class_names:  # pictures without labels, and a network that gives logits
        loaded = replace(loaded, task=replace(loaded.task, logits=True))
    return loaded


def require_classes(origin: str, class_names: Sequence[str], loaded: datasets.Data) -> None:
    """Raises InputError where a data set's classes are not those, in that order, that the network tells apart."""
    if not class_names:
        raise InputError(f"{origin} records no names of its classes: give those of its logits with --classes FILE")
    if tuple(class_names) != loaded.class_names:
        pairs = itertools.zip_longest(class_names, loaded.class_names, fillvalue="nothing")
        own, other = next((own, other) for own, other in pairs if own != other)
        raise InputError(
            f"{loaded.name} has the class '{other}' where {origin} was trained on '{own}': give the data of its "
            "classes, or calibrate on pictures without labels, images:DIR"
        )


def _require_vocabulary(made: checkpoint.Checkpoint, loaded: datasets.Data) -> None:
    """Raises InputError where the tokenizer in the file gives tokens, or types of tokens, that its network lacks."""
    if not text.has(made.model.name):
        return
    limits = text.limits(made.model)
    for split in (loaded.train, loaded.test):
        if not isinstance(split, datasets.TextSplit):
            return  # tensors of the user's own
        for row, what, limit in ((0, "token", limits[0]), (2, "type of tokens", limits[1])):
            most = int(split.tokens[:, row].max())
            if most >= limit and (row == 0 or limit > 1):
                raise InputError(
                    f"{made.origin}: its tokenizer gives the {what} {most}, its network knows {limit}: write it again"
                )


def require_kinds(network: object, data: object) -> None:
    """Raise InputError for what is no network, or no data, of a function of the API."""
    if isinstance(network, type):
        raise InputError(f"{network.__name__} is a class: give a network that was made of it")
    if not isinstance(network, nn.Module | checkpoint.Checkpoint | Result | Pretrained | str | Path):
        raise InputError(
            f"{network!r} is no network: give a torch module, a path, or what a function of r2cli returned"
        )
    if not isinstance(data, datasets.Data | str | None):
        raise InputError(f"data is a {type(data).__name__}: give a name, or what r2cli.load_data makes of it")
