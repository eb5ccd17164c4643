"""The network of an ONNX program: an interpreter of its nodes, with a module for each of them.

The modules stand where the file's names say, with the parameters below them, so that a state_dict, a layer table and a
graph of torch.export have names that people know.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from r2cli.errors import InputError
from r2cli.models.onnx_program import OPERATORS, OnnxNode, OnnxProgram
from r2cli.models.onnx_values import KINDS, LARGEST, Uncomputable, Value


class OnnxStep(nn.Module):
    """One node: from the values of its inputs to those of its outputs, always a list."""

    def __init__(self, node: OnnxNode) -> None:
        super().__init__()
        self.node = node
        self.attributes = {**node.attributes, "outputs": len(node.outputs)}

    def forward(self, values: list[Value], device: torch.device) -> list[Value]:
        try:
            found = OPERATORS[self.node.operator].compute({**self.attributes, "device": device}, *values)
        except Uncomputable as why:
            raise InputError(f"node '{self.node.path}' ({self.node.operator}) cannot be computed: {why}") from why
        results = list(found)[: len(self.node.outputs)] if isinstance(found, tuple) else [found]
        for one in results:
            if isinstance(one, Tensor) and math.prod(n for n in one.shape if isinstance(n, int)) > LARGEST:
                raise InputError(f"node '{self.node.path}' ({self.node.operator}) makes {tuple(one.shape)} values")
        return results


class OnnxNetwork(nn.Module):
    """The network of `program`, with weights that nobody has set.

    It takes its inputs by place, the batch first, and gives one tensor or a tuple of them.
    """

    def __init__(self, program: OnnxProgram) -> None:
        super().__init__()
        self.__class__ = _with_signature(program.inputs)
        self.program = program
        for node in sorted(program.nodes, key=lambda node: node.path):  # what holds others stands before them
            parent, _, last = node.path.rpartition(".")
            holder(self, parent).add_module(last, OnnxStep(node))
        self.holders: list[tuple[str, nn.Module, str]] = []
        for path, held in program.tensors.items():
            parent, _, last = path.rpartition(".")
            own = holder(self, parent)
            empty = torch.zeros(held.shape, dtype=KINDS[held.kind])
            if held.trained and empty.is_floating_point():
                own.register_parameter(last, nn.Parameter(empty))
            else:
                own.register_buffer(last, empty)
            self.holders.append((path, own, last))
        self.steps = [(node, self.get_submodule(node.path), done) for node, done in _with_last_reads(program)]

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        known: dict[str, Any] = {
            "": None,
            **dict(zip(self.program.inputs, inputs, strict=True)),
            **self.program.numbers,
        }
        known |= {path: getattr(holder, name) for path, holder, name in self.holders}
        for node, step, done in self.steps:
            given = step([known[name] for name in node.inputs], inputs[0].device)
            known |= zip(node.outputs, given, strict=True)
            for name in done:
                known.pop(name, None)
        found = tuple(known[name] for name in self.program.results)
        return found[0] if len(found) == 1 else found


def _with_signature(inputs: Sequence[str]) -> type[OnnxNetwork]:
    """The class of a network whose `forward` has an argument for each input: torch.export wants to know them."""

    def forward(self: OnnxNetwork, *given: Tensor) -> Tensor | tuple[Tensor, ...]:
        return OnnxNetwork.forward(self, *given)

    names = ["self", *(f"input_{place}" for place in range(len(inputs)))]
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return type("OnnxNetwork", (OnnxNetwork,), {"forward": forward, "__module__": OnnxNetwork.__module__})


def _with_last_reads(program: OnnxProgram) -> list[tuple[OnnxNode, tuple[str, ...]]]:
    """The nodes, each with the values that no later one reads."""
    needed, found = set(program.results), []
    for node in reversed(program.nodes):
        found.append((node, tuple({*node.inputs, *node.outputs} - needed - {""})))
        needed.update(node.inputs)
    return found[::-1]


def holder(root: nn.Module, path: str) -> nn.Module:
    """The module of `root` at `path`, made where there is none."""
    for part in path.split(".") if path else ():
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    return root
