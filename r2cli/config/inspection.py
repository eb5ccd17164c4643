"""The configs of what looks at files, writes ONNX and runs recipes, and what each command writes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from r2cli.config import groups, values
from r2cli.config.groups import Written
from r2cli.config.option import GATES, OUTPUT, Config, option

SORTS = ("sqnr", "range", "outliers", "kurtosis", "size", "name")


@dataclass(frozen=True)
class AnalyzeConfig(Config):
    """What to measure of weights, and what to show first."""

    only: Sequence[str] = option((), "Layers by name pattern; repeatable.", given=list[str] | None)
    view: str = option(
        "both",
        "Of a checkpoint with BatchNorm: trained, folded, or both.",
        check=values.one_of("--view", "both", "trained", "folded"),
    )
    outlier_sigma: float = option(
        4.0,
        "An outlier is further from the mean than this many standard deviations; of normal weights 4 leaves "
        "1 in 16,000 there.",
        least=0.1,
    )
    bits: int = option(
        4,
        "8, 4, 3, 2 or 1: what the table and its order are about.",
        check=values.number_of("--bits", *values.MEASURED_BITS, what="not measured"),
    )
    granularity: str = option(
        "tensor",
        "tensor or channel: the grids that --sort sqnr and --min-sqnr look at.",
        check=values.one_of("--granularity", "tensor", "channel"),
    )
    sort: str | None = option(
        None,
        "sqnr, range, outliers, kurtosis, size or name. (default: sqnr; quick: range)",
        check=values.one_of("--sort", *SORTS),
    )
    limit: int | None = option(None, "Layers in a table or picture; 0: all. (default: 12, several tables 8)", least=0)
    everything: bool = option(False, "Biases and other vectors too.", "--all")
    quick: bool = option(False, "Ranges and outliers only: no SQNR, no channels.")
    threads: int | None = option(None, "Tensors side by side. (default: one a core)", least=1)

    @property
    def order(self) -> str:
        """What layers are sorted by."""
        return self.sort or ("range" if self.quick else "sqnr")


@dataclass(frozen=True)
class WeightGates(Config):
    """What no layer may exceed."""

    max_range_ratio: float | None = option(None, "Most max|w| / std of a layer.", panel=GATES, least=0)
    max_outliers: float | None = option(None, "Most of a layer that is outliers, 0 to 1.", panel=GATES, least=0)
    min_sqnr: str | None = option(
        None, "DB@BITS: least SQNR of a layer on min-max grids.", panel=GATES, check=values.sqnr_floor
    )


@dataclass(frozen=True)
class AnalyzeFiles(Config):
    files: Sequence[Path] = option(
        (),
        "Weights: any .safetensors file, an index of shards or their directory, or .onnx; several are "
        "compared. (default: model.safetensors)",
        is_argument=True,
        given=list[Path] | None,
    )


@dataclass(frozen=True)
class EvaluateSource(groups.Inputs):
    source: Path | None = option(
        None,
        "A checkpoint, float or quantized, or an .onnx file of r2's. (default: model.safetensors)",
        is_argument=True,
    )


@dataclass(frozen=True)
class EvaluateConfig(Config):
    """Where a network is measured."""

    device: str = groups.device()


@dataclass(frozen=True)
class AnalyzeOutput(Written):
    output: Sequence[Path] = option(
        (),
        "A picture (.png, .svg, .pdf) or a page (.html); repeatable.",
        "--output",
        "-o",
        panel=OUTPUT,
        given=list[Path] | None,
    )


@dataclass(frozen=True)
class PretrainOutput(Written):
    output: Path = groups.output(groups.DEFAULT_SOURCE, "The checkpoint to write.")
    resume: bool = groups.resume()


@dataclass(frozen=True)
class PtqOutput(Written):
    output: Path | None = groups.output(None, "The checkpoint; .onnx goes beside it. (default: SOURCE.w4a8-none...)")
    resume: bool = groups.resume()


@dataclass(frozen=True)
class QatOutput(Written):
    output: Path | None = groups.output(None, "The checkpoint; .onnx goes beside it. (default: SOURCE.w4a8-lsq...)")
    resume: bool = groups.resume()


@dataclass(frozen=True)
class PalettizeOutput(Written):
    output: Path | None = groups.output(None, "The checkpoint; .onnx goes beside it. (default: SOURCE.b4d1-dkm...)")
    resume: bool = groups.resume()


@dataclass(frozen=True)
class ExportOutput(Written):
    output: Path | None = groups.output(None, "The file. (default: SOURCE with .onnx)")


@dataclass(frozen=True)
class RecipeConfig(Config):
    """Which steps of a recipe run, and how."""

    recipe: str = option(
        "", "A recipe, FILE.toml or the name of a shipped one: `r2 recipe ls`.", is_argument=True, given=str
    )
    jobs: int = option(1, "Steps side by side, in processes that share the threads.", "--jobs", "-j", least=1)
    only: str | None = option(None, "Steps whose output matches this, or whose line has it; and what they read from.")
    set: Sequence[str] = option(
        (),
        "KEY=VALUE in steps that have KEY, COMMAND.KEY=VALUE in a command's, matrix.NAME=VALUE; repeatable.",
        given=list[str] | None,
    )
    smoke: bool = option(False, "Try the recipe in a minute: 64 digits, one epoch, one combination.")
    work_dir: Path | None = option(None, "Where the steps' files go. (default: runs/RECIPE)", panel=OUTPUT)
    resume: bool = option(
        False, "Check what was done before: other options, or a file that was changed, are an error.", panel=OUTPUT
    )
