"""Which keywords of a network's factory a checkpoint may hold: those that describe the network, and none that load.

A checkpoint is a file from anywhere. Its metadata names a network and the keywords of its factory. A keyword that names
a file, an address or a set of pre-trained weights would let that file decide what else is read, fetched or run. So the
values are numbers, booleans, short words, and lists of these (for text also tables of these, as transformers'
configurations have), and a keyword whose name speaks of loading is refused whatever its value.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from r2cli.errors import InputError

LONGEST_WORD = 64  # characters
DEEPEST = 6  # lists within lists
# A word has no dot, slash, colon or tilde: it is no path, no address and no file's name.
WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_+-]*")
# Parts of a keyword's name, between underscores, that speak of loading weights or code.
LOADS = frozenset(
    ("pretrained", "checkpoint", "checkpoints", "weights", "url", "file", "filename", "cache", "hub", "repo")
    + ("backbone", "kernels", "implementation", "auto", "custom", "code", "quantization", "revision")
    + ("scriptable", "exportable", "adapter", "adapters", "peft")
)
# Keywords of transformers' configurations that have such a part in their name and load nothing.
HARMLESS = frozenset(("gradient_checkpointing", "use_cache"))


def is_own(name: str) -> bool:
    """Whether a network's name names code of the user's own: `file.py:FACTORY` or `package.module:FACTORY`."""
    return ":" in name and not name.startswith(("timm:", "text:"))


def require_safe(model: str, keywords: Mapping[str, Any], origin: str) -> None:
    """Raises InputError, naming the keyword, where one of `keywords` for the factory of `model` may load something.

    `origin` is the file or the option that the keywords stand in.
    """
    for name, value in keywords.items():
        why = _why_not(str(name), value, DEEPEST, tables=model.startswith("text:"))
        if why:
            raise InputError(
                f"{origin} gives the keyword '{name}' to {model}, and {why}: a keyword from a file may only "
                "describe the network: weights come with --weights, and keywords of your own code with --model-arg"
            )


def is_safe(model: str, name: str, value: Any) -> bool:
    """Whether a checkpoint may hold the keyword `name` for the factory of `model`."""
    return not _why_not(name, value, DEEPEST, tables=model.startswith("text:"))


def _why_not(name: str, value: Any, depth: int, *, tables: bool) -> str:
    """Why a keyword is refused; empty for one that is fine."""
    loads = LOADS.intersection(name.lower().replace("-", "_").split("_"))
    if name.startswith("_") or (loads and name not in HARMLESS):
        return "a keyword of this name can load files or code"
    if isinstance(value, bool | int | None) or (isinstance(value, float) and math.isfinite(value)):
        return ""
    if isinstance(value, str):
        fine = len(value) <= LONGEST_WORD and WORD.fullmatch(value) is not None
        return "" if fine else "its value is not a short word, so it may name a file or an address"
    if depth and isinstance(value, list | tuple):
        return next(filter(None, (_why_not("", each, depth - 1, tables=tables) for each in value)), "")
    if depth and tables and isinstance(value, Mapping):
        return next(filter(None, (_why_not(str(k), v, depth - 1, tables=tables) for k, v in value.items())), "")
    return "its value is neither a number nor a short word, nor a list of these"
