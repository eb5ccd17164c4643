"""Options that several commands share: what goes in, what must be reached, what comes out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r2cli.config import values
from r2cli.config.option import FOREIGN, GATES, OUTPUT, Config, option

DEFAULT_SOURCE = Path("model.safetensors")
DATA = "digits, mnist, fashion_mnist, cifar10, cifar100, imagefolder:DIR, qnli:FILE.tsv (text) or fake:CxHxW:CLASSES."


@dataclass(frozen=True)
class Preparation(Config):
    """Weights from elsewhere, and how images are prepared."""

    data_dir: Path | None = option(None, "Where downloaded data sets are. (default: ~/.cache/r2cli)")
    weights: Path | None = option(None, "Its state_dict: .safetensors, or .pth as torch.save writes.", panel=FOREIGN)
    model_arg: Sequence[str] = option(
        (), "NAME=VALUE: a keyword of the network's factory; repeatable.", panel=FOREIGN, given=list[str] | None
    )
    stem: str | None = option(None, "small or imagenet. (default: small up to 64 pixels)", panel=FOREIGN)
    size: int | None = option(
        None,
        "Pixels of an image, or tokens of a text. (default: 16 for digits, else the images' or 224; text 128)",
        panel=FOREIGN,
    )
    mean: str | None = option(
        None, "Of pixels from 0 to 1: one, or one a channel: 0.5,0.5,0.5. (default: the data's)", panel=FOREIGN
    )
    std: str | None = option(None, "As --mean. (default: the data's)", panel=FOREIGN)
    workers: int = option(2, "Processes that decode large images.", least=0)


@dataclass(frozen=True)
class Inputs(Preparation):
    """A checkpoint of r2's, or a network and weights from elsewhere, with their data."""

    source: Path | None = option(None, "The checkpoint to read. (default: model.safetensors)", is_argument=True)
    data: str | None = option(None, f"{DATA} (default: the checkpoint's)")
    model: str | None = option(
        None, "A network of no r2 checkpoint, with --weights: its name or FILE.py:FACTORY.", panel=FOREIGN
    )


@dataclass(frozen=True)
class NewNetwork(Preparation):
    """A network to train, and its data."""

    model: str = option(
        "mobilenet_v1",
        "mobilenet_v1, resnet8, 20 to 110, any of torchvision's, timm:NAME, FILE.py:FACTORY; for text, "
        "mobilebert or text:DIR, from its pre-trained weights.",
    )
    width: float | None = option(None, "Channel multiplier of a MobileNet. (default: V1 0.25, V2 1)")
    data: str = option("digits", DATA)


@dataclass(frozen=True)
class AccuracyGate(Config):
    min_accuracy: float | None = option(None, "Least top-1, in percent.", panel=GATES)


@dataclass(frozen=True)
class FileGates(AccuracyGate):
    max_bytes: int | None = option(None, "Most bytes of the written file.", panel=GATES)


@dataclass(frozen=True)
class CompressionGates(FileGates):
    max_drop: float | None = option(None, "Most points of top-1 lost against the float checkpoint.", panel=GATES)


@dataclass(frozen=True)
class Told(Config):
    """How a command answers."""

    dry_run: bool = option(False, "Say what would be done, and do nothing.", panel=OUTPUT)
    json: bool = option(False, "One JSON object on standard output.", panel=OUTPUT)


@dataclass(frozen=True)
class Written(Told):
    """How a command answers, and whether it replaces files."""

    overwrite: bool = option(False, "Replace files that are there.", panel=OUTPUT)


def output(default: Path | None, help: str) -> Any:
    """The `--output` of a command."""
    return option(default, help, "--output", "-o", panel=OUTPUT)


def usual_optimizer(name: str | None, *, is_text: bool) -> str:
    """The optimizer asked for: by default AdamW for text, as everyone fine-tunes it, and SGD for images."""
    return name or ("adamw" if is_text else "sgd")


def seed() -> Any:
    return option(0, "The same seed gives the same bytes.", least=0)


def device() -> Any:
    return option("auto", "auto, cpu, cuda or cuda:N.")


def resume() -> Any:
    return option(
        False, "Start, go on where a stopped run left off, or say that the same run is finished.", panel=OUTPUT
    )


def optimizer() -> Any:
    return option(
        None,
        "sgd or adamw. (default: adamw for text, else sgd)",
        check=values.one_of("--optimizer", "sgd", "adamw"),
    )


def embeddings() -> Any:
    return option(
        False,
        "Embeddings as codes too, as the layers', or as floats. Needs --act-bits none.",
        "--embeddings/--no-embeddings",
    )


def act_range() -> Any:
    return option(
        None,
        "Of activations: minmax, moving-average, percentile[:99.99], mse or entropy. "
        "(default: minmax at 8 bits, mse below)",
        check=values.range_rule("--act-range", *values.ACT_RANGES),
    )


def keep(help: str, check: Any) -> Any:
    return option((), help, "--keep", check=check, given=list[str] | None)
