"""Read a network: its canonical graph, in evaluation mode.

torch.export runs the network's code once and notes the operators that it computes with, whatever class or function
called them. `canonical.py` writes them again over plain modules and one function for each operation (`functions.py`).
"""

import copy
import logging
import os
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from r2cli.errors import InputError
from r2cli.graph import canonical, in_place, narrow_convolutions
from r2cli.graph.writer import Unknown
from r2cli.storage.input_spec import Given, places

WEIGHTS_ALONE = "or quantize the weights alone: --act-bits none, and for r2 ptq --method none"


class Unreadable(InputError):
    """A network whose graph torch.export cannot read; `why` is without a way out."""

    def __init__(self, why: str, way_out: str = "take out what depends on the values of tensors") -> None:
        super().__init__(f"{why}: {way_out}, {WEIGHTS_ALONE}")
        self.why = why


# What torch.export made of the last architectures. A command reads the same one several times, which takes seconds.
_programs = OrderedDict[Hashable, fx.GraphModule]()
KEPT = 8


def trace(model: nn.Module, example: Given, architecture: Hashable | None = None) -> fx.GraphModule:
    """The canonical graph of `model` in evaluation mode: the same function, the network's own parameters.

    `example` is a batch of its inputs, each (n, ...) with n > 1: torch.export takes a size of 1 for a constant. The
    graph accepts batches of any size. Networks of equal `architecture` differ in the values of their weights alone:
    torch.export runs for the first of them, and not for the others. Raises Unreadable naming what cannot be read.
    """
    model.eval()
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    known = None if architecture is None else (architecture, str(device))
    try:
        program = (
            _programs[known] if known in _programs else _exported(model, [one.to(device) for one in places(example)])
        )
    except Exception as error:  # torch.export passes on whatever the network raises
        raise _refusal(model, error) from error
    if known is not None:
        _programs[known] = _without_weights(program, model)
        _programs.move_to_end(known)
        while len(_programs) > KEPT:
            _programs.popitem(last=False)
    try:
        return narrow_convolutions.keep_plain(canonical.rewrite(copy.deepcopy(program), model))
    except in_place.AliasLost as shared:
        raise Unreadable(str(shared), "write it out of place in the network's code") from shared
    except Unknown as unknown:
        raise Unreadable(f"r2 cannot read {type(model).__name__}: {unknown}", "write it another way") from unknown


def _refusal(model: nn.Module, error: Exception) -> Unreadable:
    """What is said of an `error` of torch.export, with the way out of those that are known."""
    refused = f"torch.export cannot read {type(model).__name__}"
    first = next(iter(str(error).strip().splitlines()), "")
    if first.startswith("Constraints violated"):
        return Unreadable(
            f"{refused}: its code makes the batch's size a number",
            "write x.shape[0] in the place of len(x) or of a number",
        )
    taken = [name for name, _ in model.named_children() if hasattr(fx.GraphModule({}, fx.Graph()), name)]
    if taken and "references nonexistent attribute" in first:
        return Unreadable(
            f"{refused}: its '{taken[0]}' is called as something that graphs of torch have", "give it another name"
        )
    return Unreadable(f"{refused} ({type(error).__name__}: {first}{_place(error)})")


def _exported(model: nn.Module, example: Sequence[Tensor]) -> fx.GraphModule:
    """torch.export's graph of operators, for batches of any size."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # attention as operators, and not as one
    try:
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")  # torch.export warns about its own deprecated parts
            dim = torch.export.Dim("batch")
            exported = torch.export.export(
                model, tuple(example), dynamic_shapes=tuple({0: dim} for _ in example), strict=False
            )
            program = exported.module()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    assert isinstance(program, fx.GraphModule)
    return program


@contextmanager
def _quiet() -> Iterator[None]:
    """Let torch.export log nothing in the block, nor print to stderr: one sentence tells what it cannot read."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
            yield
    finally:
        logging.disable(before)


def _without_weights(program: fx.GraphModule, model: nn.Module) -> fx.GraphModule:
    """`program`, torch.export's graph of `model`, with empty tensors in the place of the model's own; in place."""
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    held: list[dict[str, Any]] = [*(m._parameters for m in program.modules()), *(m._buffers for m in program.modules())]
    for tensors in held:
        tensors.update({name: torch.empty(0, device="meta") for name, one in tensors.items() if id(one) in own})
    return program


def _place(error: BaseException) -> str:
    """Where in the network's own code an error was raised: its last line outside of torch and r2."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    return f", at {Path(frames[-1].filename).name} line {frames[-1].lineno}: '{frames[-1].line}'" if frames else ""
