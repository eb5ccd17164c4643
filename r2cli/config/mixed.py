"""The options of `r2 ptq` that leave it to r2 which layer gets which bits."""

from dataclasses import dataclass

from r2cli.config import values
from r2cli.config.option import Config, option


@dataclass(frozen=True)
class MixedPrecision(Config):
    """A budget for all layers together, and how it is spent."""

    target_bits: float | None = option(
        None, "Mixed precision: the average bits per weight, for example 3.2.", check=values.bits("--target-bits")
    )
    target_bytes: int | None = option(None, "Mixed precision: the bytes of all codes and scales.", least=1)
    sensitivity: str = option(
        "hessian",
        "How mixed precision measures layers: hessian, or sqnr, which needs no data.",
        check=values.one_of("--sensitivity", "hessian", "sqnr"),
    )
