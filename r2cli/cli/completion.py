"""What a shell offers when Tab is pressed behind an option: its choices, or names from the files on the line.

Nothing here imports torch: a shell waits for it.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer

from r2cli.config import targets
from r2cli.config.groups import DEFAULT_SOURCE

Offer = Callable[[typer.Context, str], list[str]]

# The networks that have no prefix and need no library.
NETWORKS = ("mobilenet_v1", "mobilenet_v2", "resnet8", "resnet18", "resnet20", "mobilebert", "timm:", "text:")
DATA = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "imagefolder:", "images:", "npz:", "qnli:", "fake:")
MOST_HEADER = 10_000_000  # bytes; a longer one is slower to read than a name is to type


def of(flag: str, check: Callable[[Any], object] | None) -> Offer | None:
    """Return what the option `flag` offers, from its table here or from the choices of its check; None for nothing."""
    if flag in OFFERED:
        return OFFERED[flag]
    choices = getattr(check, "choices", None)
    return None if choices is None else _beginning(lambda: map(str, choices))


def _beginning(names: Callable[[], Iterable[str]]) -> Offer:
    """Offer those of `names` that begin with what was typed."""

    def offer(context: typer.Context, incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return offer


def layers(context: typer.Context, incomplete: str) -> list[str]:
    """The layers of the checkpoint on the line, as --keep names them: LAYER= , whose bits come next."""
    found: dict[str, None] = {}
    # No such file, or none of ours: nothing is offered.
    with suppress(OSError, ValueError, RecursionError, AttributeError, TypeError, LookupError):
        with Path(context.params.get("source") or DEFAULT_SOURCE).open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if size <= MOST_HEADER else {}
        for name, entry in header.items():
            layer, _, kind = name.rpartition(".")
            if kind == "weight" and len(entry["shape"]) > 1:
                found[f"{layer}="] = None
    return [name for name in found if name.startswith(incomplete) and name.isprintable()]


OFFERED: Mapping[str, Offer] = {
    "--model": _beginning(lambda: NETWORKS),
    "--data": _beginning(lambda: DATA),
    "--target": _beginning(lambda: targets.TARGETS),
    "--device": _beginning(lambda: ("auto", "cpu", "cuda")),
    "--report": _beginning(lambda: ("junit:", "markdown:", "github")),
    "--keep": layers,
}
