"""What the values of options may be, and what they mean. An option's `check` asks before anything runs, of a recipe's
steps too."""

from collections.abc import Callable, Sequence

from r2cli.errors import InputError, unknown

ACT_RANGES = ("minmax", "moving-average", "percentile", "mse", "entropy")
WEIGHT_RANGES = ("minmax", "percentile", "mse")
PRECISIONS = ("auto", "float32", "bfloat16")


def one_of(kind: str, *choices: str) -> Callable[[str], None]:
    """A check that a name is among `choices`. It raises InputError, which names the nearest."""

    def check(name: str) -> None:
        if name not in choices:
            raise unknown(kind, name, choices)

    return check


def number_of(option: str, *choices: int, what: str = "impossible") -> Callable[[int], None]:
    """A check that a number is among `choices`. It raises InputError."""

    def check(value: int) -> None:
        if value not in choices:
            listed = f"{', '.join(map(str, choices[:-1]))} or {choices[-1]}"
            raise InputError(f"{option} {value} is {what}: give {listed}")

    return check


def bits(option: str) -> Callable[[float], None]:
    """A check that bits are from 1 to 8. It raises InputError."""

    def check(value: float) -> None:
        if not 1 <= value <= 8:
            raise InputError(f"{option} {value:g} is impossible: give 1 to 8")

    return check


def range_rule(option: str, *names: str) -> Callable[[str], tuple[str, float | None]]:
    """What reads a rule of ranges: its name, and the P of 'percentile:P'. It raises InputError for anything else."""

    def read(rule: str) -> tuple[str, float | None]:
        name, _, percent = rule.partition(":")
        if name not in names or (percent and name != "percentile"):
            raise unknown(option, rule, names)
        return name, percentile(percent) if percent else None

    return read


def percentile(text: str) -> float:
    """The P of 'percentile:P'. Raises InputError for what is no number from 50 to 100."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 50 < value <= 100:
        raise InputError(f"percentile:{text} is impossible: give more than 50 and up to 100, as percentile:99.9")
    return value


def act_bits(text: str, least: int = 4) -> int | None:
    """`--act-bits` as a number, which goes down to `least`; None where activations stay float.

    Raises InputError for anything else.
    """
    if text == "none":
        return None
    if text not in map(str, range(least, 9)):
        raise InputError(f"--act-bits {text} is impossible here: give 8 to {least}, or none to leave activations float")
    return int(text)


def trained_act_bits(text: str) -> int | None:
    """`act_bits` of training, which goes down to 1."""
    return act_bits(text, 1)


def keep(patterns: Sequence[str]) -> dict[str, int]:
    """`PATTERN=BITS` options as a mapping. Raises InputError for anything else."""
    kept = {}
    for text in patterns:
        pattern, _, bits = text.rpartition("=")
        if not pattern or not (bits.isascii() and bits.isdigit()):
            raise InputError(f"--keep {text} is not PATTERN=BITS, for example --keep 'classifier=8'")
        if not 1 <= int(bits) <= 8:
            raise InputError(f"--keep {text} is impossible: give 1 to 8 bits")
        kept[pattern] = int(bits)
    return kept


def keep_forms(patterns: Sequence[str], usual_dim: int = 1) -> dict[str, tuple[int, int]]:
    """`PATTERN=BITS` or `PATTERN=BITSxDIM` options as (bits, dim). Raises InputError for anything else."""
    kept = {}
    for text in patterns:
        pattern, _, form = text.rpartition("=")
        bits, _, dim = form.partition("x")
        dim = dim if "x" in form else str(usual_dim)
        if not pattern or not all(number.isascii() and number.isdigit() for number in (bits, dim)):
            raise InputError(f"--keep {text} is not PATTERN=BITS or PATTERN=BITSxDIM, for example 'classifier=8x1'")
        if not 1 <= int(bits) <= 8 or int(dim) not in (1, 2, 4, 8):
            raise InputError(f"--keep {text} is impossible: give 1 to 8 bits, and vectors of 1, 2, 4 or 8")
        kept[pattern] = int(bits), int(dim)
    return kept
