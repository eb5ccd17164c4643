"""Layers that stay float because `--keep PATTERN=float` asks for it: hidden from what works on a graph's layers."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

from torch import fx

from r2cli.graph.operators import LeftFloat
from r2cli.storage.checkpoint import Checkpoint


def hide(net: fx.GraphModule, names: Iterable[str]) -> None:
    """Wrap the named layers of `net` in modules that compute the same and are no layers; in place."""
    for name in names:
        net.set_submodule(name, LeftFloat(net.get_submodule(name)))


def show(net: fx.GraphModule) -> None:
    """Undo `hide`, in place."""
    for name, module in list(net.named_modules()):
        if isinstance(module, LeftFloat):
            net.set_submodule(name, module.layer)


@contextmanager
def hidden(net: fx.GraphModule, names: Iterable[str]) -> Iterator[None]:
    """`hide` for the time of the block."""
    hide(net, names)
    try:
        yield
    finally:
        show(net)


def asked(checkpoint: Checkpoint) -> list[str]:
    """The layers of a checkpoint with codes that have none because its history says that they were to stay float."""
    words = [entry.get("options") for entry in checkpoint.history]
    kept = [own["keep"] for own in words if isinstance(own, dict) and isinstance(own.get("keep"), dict)]
    patterns = [pattern for own in kept for pattern, word in own.items() if word == "float"]
    names = [name.removesuffix(".weight") for name in checkpoint.floats if name.endswith(".weight")]
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
