"""The values that options may have, and what they mean.

An option's `check` calls these before anything runs, also for the steps of a recipe.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from r2cli.config import layer_form
from r2cli.errors import InputError, unknown

ACT_RANGES = ("minmax", "moving-average", "percentile", "mse", "entropy")
WEIGHT_RANGES = ("minmax", "percentile", "mse")
PRECISIONS = ("auto", "float32", "bfloat16")
# Kinds of reports, and how their files end: else one could be written over a network. GitHub names its own.
REPORTS = {"junit": ".xml", "markdown": ".md", "github": ""}
COLORS = ("auto", "always", "never")
STEP = "R2_STEP"  # a variable of the steps that `r2 run` starts in processes of their own, which it reports itself


@dataclass(frozen=True)
class OneOf:
    """A check that a name is among `choices`. It raises InputError, which names the nearest one."""

    kind: str
    choices: tuple[str, ...]

    def __call__(self, name: str) -> None:
        if name not in self.choices:
            raise unknown(self.kind, name, self.choices)


def one_of(kind: str, *choices: str) -> OneOf:
    """Return a check that a name is among `choices`."""
    return OneOf(kind, choices)


@dataclass(frozen=True)
class NumberOf:
    """A check that a number is among `choices`. It raises InputError."""

    option: str
    choices: tuple[int, ...]
    what: str

    def __call__(self, value: int) -> None:
        if value not in self.choices:
            listed = f"{', '.join(map(str, self.choices[:-1]))} or {self.choices[-1]}"
            raise InputError(f"{self.option} {value} is {self.what}: give {listed}")


def number_of(option: str, *choices: int, what: str = "impossible") -> NumberOf:
    """Return a check that a number is among `choices`."""
    return NumberOf(option, choices, what)


def bits(option: str) -> Callable[[float], None]:
    """Return a check that bits are from 1 to 8. It raises InputError."""

    def check(value: float) -> None:
        if not 1 <= value <= 8:
            raise InputError(f"{option} {value:g} is impossible: give 1 to 8")

    return check


def range_rule(option: str, *names: str) -> Callable[[str], tuple[str, float | None]]:
    """Return a function that reads a rule for ranges: its name, and the P of 'percentile:P'.

    The function raises InputError for a name that is not among `names`, and for a P that makes no sense.
    """

    def read(rule: str) -> tuple[str, float | None]:
        name, _, percent = rule.partition(":")
        if name not in names or (percent and name != "percentile"):
            raise unknown(option, rule, names)
        return name, percentile(percent) if percent else None

    return read


def percentile(text: str) -> float:
    """Return the P of 'percentile:P'. Raises InputError unless it is a number above 50 and up to 100."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 50 < value <= 100:
        raise InputError(f"percentile:{text} is impossible: give more than 50 and up to 100, as percentile:99.9")
    return value


def act_bits(given: str | int, least: int = 4) -> int | None:
    """Return `--act-bits` as a number, or None for 'none', with which activations stay float.

    Raises InputError for anything but 'none', 16, and the numbers from 8 down to `least`.
    """
    text = str(given)
    if text == "none":
        return None
    if text not in map(str, (*range(least, 9), layer_form.WIDE_BITS)):
        raise InputError(
            f"--act-bits {text} is impossible here: give 8 to {least}, 16, or none to leave activations float"
        )
    return int(text)


def act_widths(given: str) -> tuple[int, ...]:
    """Return `--act-widths`, bits between commas, as numbers. Raises InputError for bits that cannot be."""
    found = [act_bits(text.strip()) for text in given.split(",")]
    return tuple(sorted({bits for bits in found if bits is not None}, reverse=True))


def widths(given: str) -> tuple[str, ...]:
    """Return what is between commas, each bits or 'float' as --keep says them. Raises InputError for anything else."""
    found = tuple(text.strip() for text in given.split(","))
    for text in found:
        try:
            layer_form.of(text)
        except InputError as error:
            raise InputError(
                f"--widths '{text}' is not a width: give 8, W4A8, W8A16 or float, between commas"
            ) from error
    return found


def trained_act_bits(given: str | int) -> int | None:
    """Return `act_bits` for training, which goes down to 1."""
    return act_bits(given, 1)


def _lines(patterns: Mapping[str, object] | Sequence[str]) -> Sequence[str]:
    """Return options NAME=VALUE as texts. The Python API may give them as a mapping, or one alone."""
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return [f"{name}={value}" for name, value in patterns.items()] if isinstance(patterns, Mapping) else patterns


def keep(patterns: Mapping[str, int | str] | Sequence[str]) -> dict[str, int | str]:
    """Return `PATTERN=WORDS` options as a mapping of words, which `layer_form.of` reads; those of one pattern are
    joined. Raises InputError for anything else."""
    kept: dict[str, int | str] = {}
    for text in _lines(patterns):
        pattern, _, words = text.rpartition("=")
        if not pattern:
            raise InputError(f"--keep {text} is not PATTERN=BITS, nor PATTERN=W4A8, =float, =tensor or =asymmetric")
        before = layer_form.of(kept[pattern]) if pattern in kept else layer_form.LayerForm()
        try:
            kept[pattern] = before.then(layer_form.of(words)).word
        except InputError as error:
            told = str(error).replace("--keep …", f"--keep {pattern}")
            raise InputError(told.replace("--keep PATTERN=", f"--keep {pattern}=")) from error
    return kept


def keep_forms(patterns: Mapping[str, object] | Sequence[str], usual_dim: int = 1) -> dict[str, tuple[int, int]]:
    """Return `PATTERN=BITS` or `PATTERN=BITSxDIM` options as (bits, dim) by pattern. Raises InputError for others."""
    kept = {}
    for text in _lines(patterns):
        pattern, _, form = text.rpartition("=")
        bits, _, dim = form.partition("x")
        dim = dim if "x" in form else str(usual_dim)
        if not pattern or not all(number.isascii() and number.isdigit() for number in (bits, dim)):
            raise InputError(f"--keep {text} is not PATTERN=BITS or PATTERN=BITSxDIM, for example 'classifier=8x1'")
        if not 1 <= int(bits) <= 8 or int(dim) not in (1, 2, 4, 8):
            raise InputError(f"--keep {text} is impossible: give 1 to 8 bits, and vectors of 1, 2, 4 or 8")
        kept[pattern] = int(bits), int(dim)
    return kept


NO_PARTS = "none"  # `--parts none`: nothing of DFQ is done


def parts(text: str | Sequence[str]) -> tuple[str, ...]:
    """Return `--parts`, which is 'none' or names between commas, as names. Raises InputError for an unknown name."""
    if isinstance(text, str):
        text = () if text == NO_PARTS else tuple(text.split(","))
    for name in text:
        one_of("--parts", "equalize", "absorb", "correct")(name)
    return tuple(text)


def delta(given: str | float) -> float | None:
    """Return `--delta`: a number from 0 up, or None for 'hessian'. Raises InputError for anything else."""
    if given == "hessian":
        return None
    try:
        value = float(given)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise InputError(f"--delta {given} is impossible: give a number from 0 up, or hessian")
    return value


MEASURED_BITS = (8, 4, 3, 2, 1)  # widths that `r2 analyze` measures


def sqnr_floor(text: str) -> tuple[float, int]:
    """Return the two numbers of `--min-sqnr DB@BITS`. Raises InputError for anything else."""
    decibel, _, bits = text.partition("@")
    try:
        found = float(decibel), int(bits)
    except ValueError as error:
        raise InputError(f"--min-sqnr {text} is not DB@BITS, for example 20@4") from error
    if not math.isfinite(found[0]):
        raise InputError(f"--min-sqnr {text} would stop nothing or everything: give a number of dB")
    number_of("--min-sqnr …@", *MEASURED_BITS, what="not measured")(found[1])
    return found


def input_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return `NAME=1x3x224x224` options as shapes by name. Raises InputError for anything else."""
    found = {}
    for text in texts:
        name, _, sizes = text.rpartition("=")
        parts = sizes.split("x")
        if not name or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
            raise InputError(f"--shape {text} is not NAME=SIZES, for example --shape input=1x3x224x224")
        found[name] = tuple(map(int, parts))
    return found


def size(given: int | str | None) -> int | tuple[int, int] | None:
    """Pixels of both sides, or height and width, as 48x320. Raises InputError for anything else."""
    sides = [] if given is None else str(given).split("x")
    if not all(part.isdecimal() for part in sides) or len(sides) > 2:
        raise InputError(f"--size {given} is not a number of pixels, or two as 48x320 (height x width)")
    return None if not sides else int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def report_kind(asked: str) -> tuple[str, Path | None]:
    """Return the kind and the file of a `--report`, such as 'junit:r2.xml'. 'github' may do without a file.

    Raises InputError for another kind, a file that is not named or has another ending, and a folder.
    """
    kind, _, file = asked.partition(":")
    if kind not in REPORTS:
        raise unknown("--report", kind, REPORTS)
    if not file and kind != "github":
        raise InputError(f"--report {asked} names no file: give {kind}:FILE")
    if file and Path(file).is_dir():
        raise InputError(f"--report {asked} names a folder: give {kind}:FILE")
    if not file.endswith(REPORTS[kind]):
        raise InputError(f"--report {asked} must end in {REPORTS[kind]}")
    return kind, Path(file) if file else None


def reports(asked: Sequence[str]) -> None:
    """Check every `--report`. Raises InputError as `report_kind` does."""
    for each in asked:
        report_kind(each)


def numbers(option: str, text: str | None) -> list[float] | None:
    """Numbers with commas between them. Raises InputError for anything else."""
    if text is None:
        return None
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option} {text} is not one number or one a channel: give for example 0.5,0.5,0.5") from error
    if not all(map(math.isfinite, found)):
        raise InputError(f"{option} {text} is impossible: give finite numbers")
    return found
