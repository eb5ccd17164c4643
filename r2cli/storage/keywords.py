"""Which keywords of a network's factory a checkpoint may hold: those that describe the network, not those that load.

A checkpoint may come from anyone. Its metadata names a network and the keywords of its factory. With a keyword that
names a file, an address or pre-trained weights, the file could decide what else is read, downloaded or run. Two rules
prevent that. A value is a number, a boolean, a short word, or a list of these (for text networks also a dict of these,
since transformers' configurations have dicts). A keyword with a name about loading is refused whatever its value is.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from r2cli.errors import InputError

LONGEST_WORD = 64  # characters
DEEPEST = 6  # levels of lists within lists; more would be an attack on the recursion, not a network
# A word has no dot, slash, colon or tilde, so it cannot be a path, an address or the name of a file.
WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_+-]*")
# The graph of a network that came as an ONNX file: compressed, at most 64 MB.
GRAPH = re.compile(r"[A-Za-z0-9+/]{1,67108864}={0,2}")
# A keyword is refused if one of these words is in its name, between underscores: they are about loading.
LOADS = frozenset(
    ("pretrained", "checkpoint", "checkpoints", "weights", "url", "file", "filename", "cache", "hub", "repo")
    + ("backbone", "kernels", "implementation", "auto", "custom", "code", "quantization", "revision")
    + ("scriptable", "exportable", "adapter", "adapters", "peft")
)
# These keywords of transformers' configurations have such a word in their name, but load nothing.
HARMLESS = frozenset(("gradient_checkpointing", "use_cache"))


def is_own(name: str) -> bool:
    """Say whether `name` is the user's own code: `file.py:FACTORY` or `package.module:FACTORY`."""
    return ":" in name and not name.startswith(("timm:", "text:"))


def require_safe(model: str, keywords: Mapping[str, Any], origin: str) -> None:
    """Raise InputError with the name of the first of `keywords` that may make the factory of `model` load something.

    `origin` is the file or the option that the keywords come from.
    """
    for name, value in keywords.items():
        if model == "onnx" and name == "graph" and isinstance(value, str) and GRAPH.fullmatch(value):
            continue  # it is no name of anything, and `models.onnx_program` checks what it says
        why = _why_not(str(name), value, DEEPEST, tables=model.startswith("text:"))
        if why:
            raise InputError(
                f"{origin} gives the keyword '{name}' to {model}, and {why}: a keyword from a file may only "
                "describe the network: weights come with --weights, and keywords of your own code with --model-arg"
            )


def is_safe(model: str, name: str, value: Any) -> bool:
    """Say whether a checkpoint may hold the keyword `name` for the factory of `model`."""
    return not _why_not(name, value, DEEPEST, tables=model.startswith("text:"))


def _why_not(name: str, value: Any, depth: int, *, tables: bool) -> str:
    """Return why a keyword is refused, or an empty text where it is allowed."""
    loads = LOADS.intersection(name.lower().replace("-", "_").split("_"))
    if name.startswith("_") or (loads and name not in HARMLESS):
        return "a keyword of this name can load files or code"
    if isinstance(value, bool | int | None) or (isinstance(value, float) and math.isfinite(value)):
        return ""
    if isinstance(value, str):
        fine = len(value) <= LONGEST_WORD and WORD.fullmatch(value) is not None
        return "" if fine else "its value is not a short word, so it may name a file or an address"
    if depth and isinstance(value, list | tuple):
        return next(filter(None, (_why_not("", item, depth - 1, tables=tables) for item in value)), "")
    if depth and tables and isinstance(value, Mapping):
        return next(filter(None, (_why_not(str(k), v, depth - 1, tables=tables) for k, v in value.items())), "")
    return "its value is neither a number nor a short word, nor a list of these"
