"""The options of the commands that read files, write ONNX and run recipes; and the outputs of all commands."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from r2cli.config import groups, targets, values
from r2cli.config.groups import ModelWritten, Written
from r2cli.config.option import FOREIGN, GATES, OUTPUT, Config, option

SORTS = ("sqnr", "range", "outliers", "kurtosis", "size", "name")


@dataclass(frozen=True)
class AnalyzeConfig(Config):
    """What to measure of weights, and what to show first."""

    only: Sequence[str] = option(
        (), "Show only layers whose names match this pattern; repeatable.", given=list[str] | None
    )
    view: str = option(
        "both",
        "Which weights of a checkpoint with BatchNorm: trained, folded, or both.",
        check=values.one_of("--view", "both", "trained", "folded"),
    )
    outlier_sigma: float = option(
        4.0,
        "An outlier is further from the mean than this many standard deviations; with 4, 1 in 16,000 normal weights is "
        "one.",
        least=0.1,
    )
    bits: int = option(
        4,
        "Bits that the table and its order are for: 8, 4, 3, 2 or 1.",
        check=values.number_of("--bits", *values.MEASURED_BITS, what="not measured"),
    )
    granularity: str = option(
        "tensor",
        "Grids that --sort sqnr and --min-sqnr use: one per tensor, or one per channel.",
        check=values.one_of("--granularity", "tensor", "channel"),
    )
    sort: str | None = option(
        None,
        "Order of layers: sqnr, range, outliers, kurtosis, size or name. (default: sqnr; with --quick range)",
        check=values.one_of("--sort", *SORTS),
    )
    limit: int | None = option(
        None, "Number of layers in a table or picture; 0: all. (default: 12; 8 with several tables)", least=0
    )
    everything: bool = option(False, "Show biases and other vectors too.", "--all")
    quick: bool = option(False, "Measure ranges and outliers only, without SQNR and channels.")
    threads: int | None = option(None, "Number of tensors measured at once. (default: one per core)", least=1)

    @property
    def order(self) -> str:
        """What layers are sorted by."""
        return self.sort or ("range" if self.quick else "sqnr")


@dataclass(frozen=True)
class WeightGates(Config):
    """Bounds that every layer must keep."""

    max_range_ratio: float | None = option(None, "The greatest max|w| / std of a layer.", panel=GATES, least=0)
    max_outliers: float | None = option(
        None, "The greatest share of outliers in a layer, 0 to 1.", panel=GATES, least=0
    )
    min_sqnr: str | None = option(
        None, "DB@BITS: the least SQNR of a layer on min-max grids.", panel=GATES, check=values.sqnr_floor
    )


@dataclass(frozen=True)
class AnalyzeFiles(Config):
    """The files to analyze."""

    files: Sequence[Path] = option(
        (),
        "Files with weights: .safetensors, an index of shards or their directory, or .onnx. Several are compared. "
        "(default: model.safetensors)",
        is_argument=True,
        given=list[Path] | None,
    )


@dataclass(frozen=True)
class EvaluateSource(groups.Inputs):
    """The network to measure."""

    source: Path | None = option(
        None,
        "A checkpoint, float or quantized, or an .onnx or .tflite file that r2 wrote. (default: model.safetensors)",
        is_argument=True,
    )


@dataclass(frozen=True)
class EvaluateConfig(Config):
    """Where a network is measured."""

    device: str = groups.device()
    runtime: str | None = option(
        None, "What runs an .onnx file: onnxruntime, openvino or tflite. (default: onnxruntime)"
    )


@dataclass(frozen=True)
class CompareFiles(groups.Inputs):
    """The float network, and what was made of it."""

    source: Path | None = option(None, "The float network: a checkpoint, or an .onnx file.", is_argument=True)
    candidate: Path | None = option(
        None,
        "What was made of it: a checkpoint of ptq, qat or palettize, or an .onnx file of any tool.",
        is_argument=True,
    )


@dataclass(frozen=True)
class CompareConfig(Config):
    """On how much two networks are compared, and what is shown first."""

    samples: int = option(64, "Number of test samples that both networks run on.", least=1)
    sort: str = option(
        "cost",
        "Order of layers: cost, own, arriving (the worst first), or depth (as they run).",
        check=values.one_of("--sort", "cost", "own", "arriving", "depth"),
    )
    limit: int = option(12, "Number of layers in the table; 0: all.", least=0)
    mend: int = option(3, "How many of the worst layers get other choices measured.", least=0)
    cost: Path | None = option(
        None, "FILE.csv of what each layer costs at each width, as `r2 cost` writes: choices are sorted by dB per cost."
    )


@dataclass(frozen=True)
class CostConfig(Config):
    """Where layers are measured, and at which widths."""

    target: str = option(
        targets.DEFAULT,
        "onnxruntime (microseconds of each layer alone), or ethos-u (cycles, by Vela).",
        check=values.one_of("--target", targets.DEFAULT, targets.ETHOS_U),
    )
    widths: str = option(
        "W8A8,W4A8,W2A8",
        "What to measure, between commas, as --keep says it: 8, W4A8, W8A16, float.",
        check=values.widths,
    )


@dataclass(frozen=True)
class CostOutput(Written):
    output: Path = groups.output(Path("cost.csv"), "The table to write.")


@dataclass(frozen=True)
class VerifyFiles(Config):
    """The file to prove, and what it was made from."""

    file: str = option("", "The .onnx file, r2's or anybody's; or r2's .tflite file.", is_argument=True, given=str)
    against: Path | None = option(
        None,
        "What it was written from: the checkpoint with its codes, or the float .onnx file. (default: the file alone)",
    )
    data: str | None = option(None, f"{groups.DATA} (default: that of the file, else random inputs)")
    data_dir: Path | None = option(None, "The folder of downloaded data sets. (default: ~/.cache/r2cli)")
    model: str | None = option(None, "FILE.py:FACTORY, where the checkpoint's network is yours.", panel=FOREIGN)
    model_arg: Sequence[str] = option(
        (), "NAME=VALUE: a keyword of its factory; repeatable.", panel=FOREIGN, given=list[str] | None
    )


@dataclass(frozen=True)
class VerifyConfig(Config):
    """Where a file must run, and on what inputs."""

    runtime: Sequence[str] = option(
        (),
        "Runtimes that must run it too, beside plain ONNX Runtime: onnxruntime, openvino, tflite; repeatable. "
        "(default: the first two, where they are installed)",
        given=list[str] | None,
    )
    shape: Sequence[str] = option(
        (),
        "NAME=1x3x224x224: the shape of an input that is drawn at random; repeatable. (default: the file's own)",
        check=values.input_shapes,
        given=list[str] | None,
    )
    seed: int = groups.seed()


@dataclass(frozen=True)
class VerifyGates(Config):
    """Bounds on a file that is proved."""

    max_bytes: int | None = option(None, "The greatest size of the file, in bytes.", panel=GATES)
    max_latency: float | None = groups.max_latency()


@dataclass(frozen=True)
class AnalyzeOutput(Written):
    output: Sequence[Path] = option(
        (),
        "Write a picture (.png, .svg, .pdf) or a page (.html); repeatable.",
        "--output",
        "-o",
        panel=OUTPUT,
        given=list[Path] | None,
    )


@dataclass(frozen=True)
class CompareOutput(Written):
    output: Path | None = groups.output(
        None, "Write a picture (.png) of the dB along the depth, or a page (.html) with every layer."
    )


@dataclass(frozen=True)
class PretrainOutput(Written):
    output: Path = groups.output(groups.DEFAULT_SOURCE, "The checkpoint to write.")
    plot: bool = option(
        False, "Draw the loss, metric and ranges over the epochs, as .png beside the output.", panel=OUTPUT
    )
    resume: bool = groups.resume()


@dataclass(frozen=True)
class PtqOutput(ModelWritten):
    output: Path | None = groups.output(None, "The checkpoint; .onnx goes beside it. (default: SOURCE.w4a8-none...)")
    plot: bool = option(False, "Draw the dB of each layer, as .png beside the output.", panel=OUTPUT)
    resume: bool = groups.resume()


@dataclass(frozen=True)
class QatOutput(ModelWritten):
    output: Path | None = groups.output(None, "The checkpoint; .onnx goes beside it. (default: SOURCE.w4a8-lsq...)")
    plot: bool = option(False, "Draw the loss and metric over the epochs, as .png beside the output.", panel=OUTPUT)
    resume: bool = groups.resume()


@dataclass(frozen=True)
class PalettizeOutput(ModelWritten):
    output: Path | None = groups.output(None, "The checkpoint; .onnx goes beside it. (default: SOURCE.b4d1-dkm...)")
    resume: bool = groups.resume()


@dataclass(frozen=True)
class ExportOutput(ModelWritten):
    output: Path | None = groups.output(None, "The ONNX file to write. (default: SOURCE with .onnx)")


@dataclass(frozen=True)
class RecipeConfig(Config):
    """Which steps of a recipe run, and how."""

    recipe: str = option(
        "", "FILE.toml, or the name of a recipe that comes with r2: see `r2 recipe ls`.", is_argument=True, given=str
    )
    jobs: int = option(
        1, "Number of steps that run at once, in processes that share the threads.", "--jobs", "-j", least=1
    )
    only: str | None = option(
        None, "Run only steps whose output matches this pattern or whose line contains it, and the steps they need."
    )
    set: Sequence[str] = option(
        (),
        "KEY=VALUE for steps that have KEY, COMMAND.KEY=VALUE for the steps of a command, or matrix.NAME=VALUE; "
        "repeatable.",
        given=list[str] | None,
    )
    smoke: bool = option(False, "Try the recipe in a minute: 64 digits, one epoch, one combination.")
    work_dir: Path | None = option(None, "Where the steps' files go. (default: runs/RECIPE)", panel=OUTPUT)
    resume: bool = option(False, "Skip finished steps; fail if options or files have changed.", panel=OUTPUT)


@dataclass(frozen=True)
class DoctorConfig(Config):
    """What `r2 doctor` looks at."""

    self_test: bool = option(True, "Try a small network, which takes some ten seconds.", "--self-test/--no-self-test")


@dataclass(frozen=True)
class InitOutput(Written):
    """Where `r2 init` writes, and how it answers."""

    output: Path = groups.output(Path("r2.toml"), "The recipe to write.")
