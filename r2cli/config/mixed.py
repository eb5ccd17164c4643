"""The options of `r2 ptq` that leave it to r2 which layer gets which bits."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r2cli.config import values
from r2cli.config.option import OUTPUT, Config, option
from r2cli.errors import InputError

PANEL = "Mixed precision"


@dataclass(frozen=True)
class MixedPrecision(Config):
    """A budget for all layers together, and how it is spent."""

    target_bits: float | None = option(
        None, "The average bits per weight, for example 3.2.", check=values.bits("--target-bits"), panel=PANEL
    )
    target_bytes: int | None = option(None, "The bytes of all codes and scales.", least=1, panel=PANEL)
    cost: Path | None = option(
        None,
        "FILE.csv with layer,width,cost: what each layer (or a pattern, or 'Conv 16x16x3x3') costs at 8, W4A8, float "
        "…; `r2 cost` writes one.",
        panel=PANEL,
    )
    budget: float | None = option(None, "The greatest sum of the costs in --cost.", least=0, panel=PANEL)
    sensitivity: str = option(
        "best",
        "How layers are measured: outputs (what rounding one changes at the outputs), hessian (needs labels), sqnr "
        "(needs no data), or best: the choice of bits by several measures that brings the outputs nearest.",
        check=values.one_of("--sensitivity", "hessian", "sqnr", "outputs", "best"),
        panel=PANEL,
    )
    act_widths: str | None = option(
        None,
        "Bits allowed for what a layer reads: 4,8,16, for example; with --target-act-bits.",
        check=values.act_widths,
        panel=PANEL,
    )
    target_act_bits: float | None = option(
        None, "The average bits of what layers read, for example 6.", least=4, most=16, panel=PANEL
    )
    minimize: str | None = option(
        None,
        "bytes or cost (of --cost): find the smallest that keeps --max-drop, by trials.",
        check=values.one_of("--minimize", "bytes", "cost"),
        panel=PANEL,
    )
    pareto: Path | None = option(
        None, "FILE.png: plot the loss against size or cost, for the best choices.", panel=OUTPUT
    )

    @property
    def is_mixed(self) -> bool:
        """Whether layers get bits of their own."""
        return bool(self.target_bits or self.target_bytes or self.cost or self.minimize)


def require_mixed(given: Any) -> None:
    """Raise InputError for options of a `MixedPrecision` that exclude each other, or lack one."""
    asked = {
        "--weight-bits": given.weight_bits,
        "--target-bits": given.target_bits,
        "--target-bytes": given.target_bytes,
        "--budget": given.budget,
        "--minimize": given.minimize,
    }
    found = [f"{flag} {value}" for flag, value in asked.items() if value is not None]
    if len(found) > 1:
        raise InputError(f"{' and '.join(found)} exclude each other: give one of them")
    if given.cost is not None and given.budget is None and given.minimize != "cost":
        raise InputError(f"--cost {given.cost} needs a limit: give --budget, or --minimize cost")
    if given.cost is None and (given.budget is not None or given.minimize == "cost"):
        raise InputError(f"{found[0]} is a sum of costs: give --cost FILE.csv, which `r2 cost` writes")
    if (given.act_widths is None) != (given.target_act_bits is None):
        raise InputError("--act-widths and --target-act-bits belong together: give both")
    if given.act_widths is not None and (not given.is_mixed or given.cost is not None):
        raise InputError("--act-widths needs --target-bits or --target-bytes; with --cost the widths are in the table")
    if given.act_widths is not None and values.act_bits(given.act_bits) is None:
        raise InputError("--act-widths are of activations on grids: leave --act-bits none out")
    if given.pareto is not None and (not given.is_mixed or given.pareto.suffix != ".png"):
        raise InputError(f"--pareto {given.pareto} draws a choice of bits, as .png: give --target-bits or --cost too")
