"""Options that several commands share: their input, their gates, and their output."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r2cli import registry
from r2cli.config import layer_form, targets, values
from r2cli.config.option import FOREIGN, GATES, OUTPUT, Config, option
from r2cli.errors import InputError

Keep = Mapping[str, int | str] | Sequence[str]  # what --keep says of layers
DEFAULT_SOURCE = Path("model.safetensors")
DATA = (
    "digits, mnist, fashion_mnist, cifar10, cifar100, imagefolder:DIR, qnli:FILE.tsv (text), images:DIR (without "
    "labels), npz:FILE|DIR (arrays), fake:CxHxW:CLASSES, or your own FILE.py:FACTORY."
)


@dataclass(frozen=True)
class Preparation(Config):
    """Weights that r2 did not write, and how images are prepared."""

    data_dir: Path | None = option(None, "The folder of downloaded data sets. (default: ~/.cache/r2cli)")
    weights: Path | None = option(
        None, "A file with its state_dict: .safetensors, or .pth as torch.save writes it.", panel=FOREIGN
    )
    pretrained: bool = option(
        False,
        "Take the weights that torchvision or timm publishes for the network: downloaded once.",
        "--pretrained",
        panel=FOREIGN,
    )
    model_arg: Sequence[str] = option(
        (), "NAME=VALUE: a keyword of the network's factory; repeatable.", panel=FOREIGN, given=list[str] | None
    )
    stem: str | None = option(
        None, "First convolution: small (stride 1) or imagenet. (default: small up to 64 pixels)", panel=FOREIGN
    )
    size: int | str | None = option(
        None,
        "Pixels of an image, as 224 or 48x320 (height x width), or tokens of a text. (default: digits 16, else the "
        "size of the images or 224; text 128)",
        check=values.size,
        given=str | None,
        panel=FOREIGN,
    )
    mean: str | None = option(
        None,
        "Mean of pixels from 0 to 1: one number, or one per channel, as 0.5,0.5,0.5. (default: that of the data)",
        panel=FOREIGN,
    )
    std: str | None = option(
        None, "Standard deviation of pixels, given as --mean is. (default: that of the data)", panel=FOREIGN
    )
    workers: int = option(2, "Number of processes that decode large images.", least=0)
    classes: Path | None = option(
        None,
        "A text file with the names of the network's classes, one a line in the order of its logits: folders get "
        "numbers by this order; some may be missing.",
        panel=FOREIGN,
    )
    data_arg: Sequence[str] = option(
        (), "NAME=VALUE: a keyword of --data FILE.py:FACTORY; repeatable.", panel=FOREIGN, given=list[str] | None
    )
    metric: str | None = option(
        None,
        "How good the network is: top1, top5, miou, f1, auroc, mse, mae, r2, psnr, torchmetrics:CLASS, or your own "
        "FILE.py:FUNCTION of outputs and targets. (default: top1 where there are labels)",
    )
    metric_arg: Sequence[str] = option(
        (), "NAME=VALUE: a keyword of --metric; repeatable.", panel=FOREIGN, given=list[str] | None
    )
    metric_lower: bool = option(False, "Lower values of your --metric are better.", "--metric-lower", panel=FOREIGN)


@dataclass(frozen=True)
class Inputs(Preparation):
    """A checkpoint of r2, or another network with its weights; and the data."""

    source: Path | None = option(None, "The checkpoint to read. (default: model.safetensors)", is_argument=True)
    data: str | None = option(None, f"{DATA} (default: that of the checkpoint)")
    calibration_data: str | None = option(None, "Data for calibration, if not --data; same form. (default: --data)")
    input_shape: Sequence[str] = option(
        (),
        "NAME=1x80x100: the shape of an input, without the batch, if there is no data; repeatable.",
        panel=FOREIGN,
        given=list[str] | None,
    )
    model: str | None = option(
        None, "The network of --weights, if it is no r2 checkpoint: its name or FILE.py:FACTORY.", panel=FOREIGN
    )


@dataclass(frozen=True)
class NewNetwork(Preparation):
    """A network to train, and its data."""

    model: str = option(
        "mobilenet_v1",
        "mobilenet_v1, resnet8, resnet20 to resnet110, any network of torchvision, timm:NAME or FILE.py:FACTORY; for "
        "text mobilebert or text:DIR, with pre-trained weights.",
    )
    width: float | None = option(None, "Channel multiplier of a MobileNet. (default: V1 0.25, V2 1)")
    data: str = option("digits", DATA)


@dataclass(frozen=True)
class MeasuredImages(Config):
    """How much of the test split is measured."""

    eval_images: int | None = option(
        None, "Number of test images, drawn at random, that accuracy is measured on. (default: all)", least=1
    )


@dataclass(frozen=True)
class Evaluation(MeasuredImages):
    """Whether and on what accuracy is measured."""

    eval: bool = option(True, "Measure accuracy, or only make the file and prove it.", "--eval/--no-eval")


@dataclass(frozen=True)
class AccuracyGate(Config):
    """A bound on how good the network is."""

    min_accuracy: float | None = option(None, "The lowest top-1 allowed, in percent.", panel=GATES)
    min_metric: float | None = option(
        None, "The lowest value of --metric allowed; the highest, where lower is better.", panel=GATES
    )
    baseline: Path | None = option(
        None, "The manifest of a model that was made before, NAME.manifest.json, to compare with.", panel=GATES
    )
    max_regression: float | None = option(
        None,
        "The largest drop of --metric from --baseline, in its points or unit. (default: 0)",
        panel=GATES,
        least=0,
    )


@dataclass(frozen=True)
class FileGates(AccuracyGate):
    """Bounds on a written file."""

    max_bytes: int | None = option(None, "The largest size of the written file, in bytes.", panel=GATES)


def max_latency() -> Any:
    return option(
        None,
        "The longest time, as a share of the float network's: 0.8, for example.",
        panel=GATES,
        least=0,
    )


@dataclass(frozen=True)
class ExportGates(FileGates):
    """Bounds on a written file, and on its speed."""

    max_latency: float | None = max_latency()


@dataclass(frozen=True)
class CompressionGates(ExportGates):
    """Bounds on a compressed network."""

    max_drop: float | None = option(
        None, "The largest drop of --metric from the float checkpoint, in its points or dB.", panel=GATES
    )
    min_sqnr: float | None = option(
        None, "The lowest signal to noise allowed of every output against the float network's, in dB.", panel=GATES
    )


@dataclass(frozen=True)
class FileForm(Config):
    """What is fixed of an ONNX file, beside its target."""

    batch: str | None = option(
        None,
        "Batch size of the ONNX file: a number, or dynamic. (default: that of the target)",
        check=targets.batch,
        panel=OUTPUT,
    )
    opset: int | None = option(
        None,
        "The opset of the ONNX file. (default: the lowest that has all its operators)",
        least=targets.LEAST_OPSET,
        most=targets.MOST_OPSET,
        panel=OUTPUT,
    )

    @property
    def asked(self) -> dict[str, object]:
        """What is not left to the target, by the names of options."""
        return {name: value for name, value in (("batch", self.batch), ("opset", self.opset)) if value is not None}


@dataclass(frozen=True)
class ExportForm(FileForm):
    """The form of a file that is written again."""

    target: str | None = option(
        None,
        "Where the file is to run: see `r2 targets`. (default: the checkpoint's target)",
        check=targets.get,
        panel=OUTPUT,
    )


@dataclass(frozen=True)
class Listed(Config):
    """How a command that only tells answers."""

    json: bool = option(False, "Print one JSON object on standard output.", panel=OUTPUT)
    report: Sequence[str] = option(
        (),
        "How the command ended, for a pipeline: junit:FILE.xml, markdown:FILE.md or github; repeatable.",
        panel=OUTPUT,
        check=values.reports,
        given=list[str] | None,
    )
    quiet: bool = option(False, "No progress; the table and the checks stay.", "--quiet", "-q", panel=OUTPUT)
    verbose: bool = option(False, "The time before each line of progress.", "--verbose", "-v", panel=OUTPUT)
    color: str = option(
        "auto",
        "auto (a terminal, unless NO_COLOR is set), always or never.",
        panel=OUTPUT,
        check=values.one_of("--color", *values.COLORS),
    )


@dataclass(frozen=True)
class Told(Listed):
    """How a command answers."""

    dry_run: bool = option(False, "Say what would be done, and do nothing.", panel=OUTPUT)


@dataclass(frozen=True)
class Written(Told):
    """How a command answers, and whether it replaces files."""

    overwrite: bool = option(False, "Replace files that exist already.", panel=OUTPUT)


@dataclass(frozen=True)
class ModelWritten(Written):
    """How a command that writes an .onnx file answers."""

    card: Path | None = option(
        None, "A page about the .onnx file, with Hugging Face's front matter, as README.md.", panel=OUTPUT
    )


def output(default: Path | None, help: str) -> Any:
    """Return the option `--output` of a command."""
    return option(default, help, "--output", "-o", panel=OUTPUT)


def usual_optimizer(name: str | None, *, is_text: bool) -> str:
    """Return the optimizer `name`. The default is AdamW for text, which is usually fine-tuned with it, and else SGD."""
    return name or ("adamw" if is_text else "sgd")


def loss(usual: str) -> Any:
    return option(
        None,
        "What is learned: cross-entropy, bce, mse, l1, ctc, distill (the float network's own outputs), or your own "
        f"FILE.py:FUNCTION of outputs and target. (default: {usual})",
    )


def seed() -> Any:
    return option(0, "Seed of all random numbers; the same seed gives the same bytes.", least=0)


def device() -> Any:
    return option("auto", "auto (a GPU if there is one), cpu, cuda or cuda:N.")


def target() -> Any:
    return option(targets.DEFAULT, "Where the file is to run: see `r2 targets`.", check=targets.get)


def for_target(name: str) -> str:
    """The part of an output's name that says for which target it is, where it is not for the usual one."""
    return "" if name == targets.DEFAULT else f"-{name}"


def resume() -> Any:
    return option(False, "Continue a stopped run; start if there is none.", panel=OUTPUT)


def optimizer() -> Any:
    return option(
        None,
        "sgd or adamw. (default: adamw for text, else sgd)",
        check=values.one_of("--optimizer", "sgd", "adamw"),
    )


def embeddings() -> Any:
    return option(
        False,
        "Give embeddings codes too, like layers, or leave them float. Codes need --act-bits none.",
        "--embeddings/--no-embeddings",
    )


def group_size() -> Any:
    return option(
        None,
        "Inputs of a linear layer that share a scale: 32, 64 or 128. It needs --act-bits none. (default: all)",
        check=values.number_of("--group-size", 32, 64, 128),
    )


def require_act_range(given: Any, act_bits: int | None) -> None:
    """Raises InputError for a rule of the ranges of activations where `act_bits` leaves all of them float."""
    if given.act_range is not None and act_bits is None:
        raise InputError(
            f"--act-range {given.act_range} is of activations on grids, and --act-bits none leaves them float: leave "
            "one of the two out"
        )


def require_groups(given: Any) -> None:
    """Raises InputError for the groups of a `PtqConfig` beside what has no place for them."""
    flag = f"--group-size {given.group_size}"
    if given.group_size is None:
        return
    if values.act_bits(given.act_bits) is not None:
        raise InputError(f"{flag} is for weights alone: give --act-bits none, or leave it out")
    if given.method != registry.PTQ_NEAREST:
        raise InputError(f"{flag} rounds to the nearest level: leave out --method {given.method}")
    if given.granularity not in (None, "channel"):
        raise InputError(f"{flag} and --granularity {given.granularity} exclude each other: give one of them")


def require_forms(given: Any, *, least: int, grids: bool = True) -> None:
    """Raises InputError for what the target or other options of a `PtqConfig` or `QatConfig` exclude in --keep. Values
    have `least` bits at least, and weights a choice of `grids` or none."""
    forms = layer_form.all_of(values.keep(given.keep))
    for form in forms:
        if form.act_bits is not None:
            values.act_bits(form.act_bits, least)
        if form.granularity is not None and getattr(given, "group_size", None) is not None:
            raise InputError(f"--group-size and --keep …={form.word} exclude each other: give one of them")
        if not grids and form.has_grid:
            raise InputError(f"--keep …={form.word} is for r2 ptq: trained weights have one symmetric grid a tensor")
    targets.require_forms(given.target, forms, act_bits=values.act_bits(given.act_bits, least))


def act_range() -> Any:
    return option(
        None,
        "Rule for ranges of activations: minmax, moving-average, percentile[:99.99], mse or entropy. "
        "(default: minmax at 8 bits, mse below)",
        check=values.range_rule("--act-range", *values.ACT_RANGES),
    )


def keep(help: str, check: Any) -> Any:
    return option((), help, "--keep", check=check, given=list[str] | None)
