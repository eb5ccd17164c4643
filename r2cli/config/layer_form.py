"""What `--keep PATTERN=…` says of layers: words between commas, each about the weight, its grid, or what it reads.

4, W4          bits of the weight
A16, W4A8      bits of what the layer reads: 16, or 8 and fewer
float          neither codes nor a grid: the layer stays as it is
tensor, channel, unfolded, asymmetric, symmetric      its grid, as --granularity and --asymmetric say of all layers
minmax, mse    the range of that grid, as --weight-range says
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from r2cli.errors import InputError, unknown

FLOAT = "float"
GRIDS = ("channel", "tensor", "unfolded")
SIGNS = {"symmetric": True, "asymmetric": False}
RULES = ("minmax", "mse")
MOST_BITS, WIDE_BITS = 8, 16  # of weights, and of activations that need more than 8
SHOWN = ("8", "W4A8", "W8A16", FLOAT, *GRIDS, *SIGNS, *RULES)


@dataclass(frozen=True)
class LayerForm:
    """What is said of one layer; None is what the other options say of all layers."""

    weight_bits: int | None = None
    act_bits: int | None = None  # of what it reads
    granularity: str | None = None
    symmetric: bool | None = None
    weight_range: str | None = None
    is_float: bool = False

    def then(self, later: "LayerForm") -> "LayerForm":
        """This form with what `later` says in its place; bits give a layer codes again."""
        is_float = later.is_float or (self.is_float and later.weight_bits is None)
        return replace(self, **later.said, is_float=is_float)

    @property
    def said(self) -> dict[str, Any]:
        """What is said, by the names of the options that say it of all layers."""
        return {name: value for name, value in self.__dict__.items() if value is not None and name != "is_float"}

    @property
    def has_grid(self) -> bool:
        """Whether something is said of the weight's grid beside its bits."""
        return (self.granularity, self.symmetric, self.weight_range) != (None, None, None)

    @property
    def word(self) -> int | str:
        """The form as --keep takes it, for records: a number where it says no more than bits of weights."""
        grid = None if self.symmetric is None else "symmetric" if self.symmetric else "asymmetric"
        if self.is_float:
            return FLOAT
        if self.act_bits is None and not self.has_grid and self.weight_bits is not None:
            return self.weight_bits
        bits = "".join(f"{key}{n}" for key, n in (("W", self.weight_bits), ("A", self.act_bits)) if n is not None)
        return ",".join(filter(None, (bits, self.granularity, grid, self.weight_range)))


def of(given: int | str) -> LayerForm:
    """The form that words between commas say. Raises InputError for a word that is unknown, or bits that are not."""
    form = LayerForm()
    for word in str(given).split(","):
        form = form.then(_of_word(word.strip(), str(given)))
    return form


def _of_word(word: str, given: str) -> LayerForm:
    if word == FLOAT:
        return LayerForm(is_float=True)
    if word in GRIDS:
        return LayerForm(granularity=word)
    if word in SIGNS:
        return LayerForm(symmetric=SIGNS[word])
    if word in RULES:
        return LayerForm(weight_range=word)
    found = re.fullmatch(r"(?=.)(?:[Ww]?([0-9]+))?(?:[Aa]([0-9]+))?", word)
    if found is None:
        raise unknown("word in --keep PATTERN=", word, SHOWN)
    weight, act = (None if bits is None else int(bits) for bits in found.groups())
    if weight is not None and not 1 <= weight <= MOST_BITS:
        raise InputError(f"--keep …={given} is impossible: give 1 to {MOST_BITS} bits, or {FLOAT}")
    if act is not None and act != WIDE_BITS and not 1 <= act <= MOST_BITS:
        raise InputError(f"--keep …={given} is impossible: what layers read has 1 to {MOST_BITS} bits, or {WIDE_BITS}")
    return LayerForm(weight, act)


def all_of(keep: Mapping[str, int | str]) -> list[LayerForm]:
    """The form that each pattern of `keep` gives by itself."""
    return [of(own) for own in keep.values()]


def shown(keep: Mapping[str, int | str]) -> list[str]:
    """What `--keep` says of layers, as options of a command line."""
    texts = (f"{pattern}={word}" for pattern, word in keep.items())
    return ["--keep '" + text.replace("'", "'\"'\"'") + "'" for text in texts]
