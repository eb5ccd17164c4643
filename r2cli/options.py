"""Options that several commands share, each stated once. Nothing here imports torch: `r2 --help` stays fast."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from r2cli import values

WORK, FOREIGN, GATES, OUTPUT = "Work", "A network of your own", "Gates (exit 1)", "Output"


def _option(
    *names: str, help: str, panel: str = WORK, check: Callable[[Any], object] | None = None, **more: object
) -> object:
    """An option of a command. `check` raises InputError for a value that cannot be, while the line is read."""

    def checked(value: Any) -> Any:
        if check is not None and value is not None:
            check(value)
        return value

    return typer.Option(*names, help=help, rich_help_panel=panel, callback=checked, **more)  # type: ignore[arg-type]


DEFAULT_SOURCE = Path("model.safetensors")


Source = Annotated[
    Path | None, typer.Argument(help="The checkpoint to read. (default: model.safetensors)", show_default=False)
]
DATA = "digits, mnist, fashion_mnist, cifar10, cifar100, imagefolder:DIR, qnli:FILE.tsv (text) or fake:CxHxW:CLASSES."
DataName = Annotated[str | None, _option("--data", help=f"{DATA} (default: the checkpoint's)")]
DataDir = Annotated[
    Path | None, _option("--data-dir", help="Where downloaded data sets are. (default: ~/.cache/r2cli)")
]
Embeddings = Annotated[
    bool,
    _option(
        "--embeddings/--no-embeddings",
        help="Embeddings as codes too, as the layers', or as floats. Needs --act-bits none.",
    ),
]
Precision = Annotated[
    str,
    _option(
        "--precision",
        help="float32, bfloat16 (mixed), or auto: bfloat16 on a GPU that has it.",
        check=values.one_of("--precision", *values.PRECISIONS),
    ),
]
Seed = Annotated[int, _option("--seed", help="The same seed gives the same bytes.", min=0)]
Optimizer = Annotated[
    str | None,
    _option(
        "--optimizer",
        help="sgd or adamw. (default: adamw for text, else sgd)",
        check=values.one_of("--optimizer", "sgd", "adamw"),
    ),
]
Device = Annotated[str, _option("--device", help="auto, cpu, cuda or cuda:N.")]
Workers = Annotated[int, _option("--workers", help="Processes that decode large images.", min=0)]

ActBits = Annotated[
    str, _option("--act-bits", help="8 to 4, or none to leave activations float.", check=values.act_bits)
]
ActRange = Annotated[
    str | None,
    _option(
        "--act-range",
        help="Of activations: minmax, moving-average, percentile[:99.99], mse or entropy. "
        "(default: minmax at 8 bits, mse below)",
        check=values.range_rule("--act-range", *values.ACT_RANGES),
    ),
]

# A network that r2 did not train, and how its images are prepared.
ModelName = Annotated[
    str | None,
    _option(
        "--model", help="A network of no r2 checkpoint, with --weights: its name or FILE.py:FACTORY.", panel=FOREIGN
    ),
]
Weights = Annotated[
    Path | None,
    _option("--weights", help="Its state_dict: .safetensors, or .pth as torch.save writes.", panel=FOREIGN),
]
ModelArg = Annotated[
    list[str] | None,
    _option("--model-arg", help="NAME=VALUE: a keyword of the network's factory; repeatable.", panel=FOREIGN),
]
Stem = Annotated[
    str | None,
    _option("--stem", help="small or imagenet. (default: small up to 64 pixels)", panel=FOREIGN),
]
Size = Annotated[
    int | None,
    _option(
        "--size",
        help="Pixels of an image, or tokens of a text. (default: 16 for digits, else the images' or 224; text 128)",
        panel=FOREIGN,
    ),
]
Mean = Annotated[
    str | None,
    _option(
        "--mean", help="Of pixels from 0 to 1: one, or one a channel: 0.5,0.5,0.5. (default: the data's)", panel=FOREIGN
    ),
]
Std = Annotated[str | None, _option("--std", help="As --mean. (default: the data's)", panel=FOREIGN)]

MinAccuracy = Annotated[float | None, _option("--min-accuracy", help="Least top-1, in percent.", panel=GATES)]
MaxDrop = Annotated[
    float | None,
    _option("--max-drop", help="Most points of top-1 lost against the float checkpoint.", panel=GATES),
]
MaxBytes = Annotated[int | None, _option("--max-bytes", help="Most bytes of the written file.", panel=GATES)]

Json = Annotated[bool, _option("--json", help="One JSON object on standard output.", panel=OUTPUT)]
DryRun = Annotated[bool, _option("--dry-run", help="Say what would be done, and do nothing.", panel=OUTPUT)]
Overwrite = Annotated[bool, _option("--overwrite", help="Replace files that are there.", panel=OUTPUT)]
