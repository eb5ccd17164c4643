"""Options that several commands share, each stated once. Nothing here imports torch: `r2 --help` stays fast."""

from pathlib import Path
from typing import Annotated

import typer

WORK, GATES, OUTPUT = "Work", "Gates (exit 1)", "Output"


def _option(*names: str, help: str, panel: str = WORK, **more: object) -> object:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)  # type: ignore[arg-type]


Source = Annotated[Path, typer.Argument(help="The checkpoint to read.", show_default=True)]
DataName = Annotated[str | None, _option("--data", help="digits or imagefolder:DIR. [default: the checkpoint's]")]
Seed = Annotated[int, _option("--seed", help="The same seed gives the same bytes.", min=0)]
Device = Annotated[str, _option("--device", help="auto, cpu, cuda or cuda:N.")]
Workers = Annotated[int, _option("--workers", help="Processes that decode large images.", min=0)]

MinAccuracy = Annotated[float | None, _option("--min-accuracy", help="Least top-1, in percent.", panel=GATES)]
MaxDrop = Annotated[
    float | None,
    _option("--max-drop", help="Most points of top-1 lost against the float checkpoint.", panel=GATES),
]
MaxBytes = Annotated[int | None, _option("--max-bytes", help="Most bytes of the written file.", panel=GATES)]

Json = Annotated[bool, _option("--json", help="One JSON object on standard output.", panel=OUTPUT)]
DryRun = Annotated[bool, _option("--dry-run", help="Say what would be done, and do nothing.", panel=OUTPUT)]
Overwrite = Annotated[bool, _option("--overwrite", help="Replace files that are there.", panel=OUTPUT)]
