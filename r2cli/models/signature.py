"""How any network is called, and what it gives: inputs by place, outputs as one tensor or a tuple of them.

A network may take its inputs by name, and give a dict, a list or a dataclass. `by_place` makes it one function of
tensors, without a module around it, which would put a prefix on every name in its state_dict.
"""

import dataclasses
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from r2cli.errors import InputError
from r2cli.storage.input_spec import INPUT, Given, TensorsSpec

OUTPUT = "output"  # what the only output of a network is called that is no classifier
Parameter = inspect.Parameter


class ByPlace(nn.Module):
    """Mixed into a network's own class: tensors by place become one tensor or a tuple.

    `raw` gives what the network's own code gives.
    """

    def raw(self, *inputs: Tensor) -> Any:
        raise NotImplementedError


def named(outputs: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of what a network gives, with their names: keys, fields, and numbers of places.

    What is None is left out. Raises InputError for anything but tensors in dicts, lists, tuples and dataclasses.
    """
    for path, leaf in pytree.tree_flatten_with_path(outputs)[0]:
        keys = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))) for key in path]
        own = re.sub(r"\W", "_", "_".join(filter(None, (name, *keys))))
        if isinstance(leaf, Tensor):
            yield (f"{OUTPUT}_{own}" if own.isdigit() else own or OUTPUT), leaf
        elif dataclasses.is_dataclass(leaf):
            yield from named({each.name: getattr(leaf, each.name) for each in dataclasses.fields(leaf)}, own)
        elif leaf is not None:
            where = f" as '{own}'" if own else ""
            raise InputError(
                f"a {type(leaf).__name__}{where}: it must give tensors, alone or in dicts, lists or tuples"
            )


def _flat(outputs: Any) -> Given:
    if isinstance(outputs, Tensor):
        return outputs
    found = tuple(tensor for _, tensor in named(outputs))
    return found if len(found) != 1 else found[0]


def by_place(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """`model`, in place, as a function of the inputs `names` by place, which gives one tensor or a tuple."""
    if isinstance(model, ByPlace):
        return model
    own, known = type(model), _parameters(model)
    keyworded = len(names) > 1 and set(names) <= set(known)
    shown = list(names) if keyworded else known[: len(names)]

    def raw(self: nn.Module, *inputs: Tensor) -> Any:
        if keyworded:
            return own.forward(self, **dict(zip(names, inputs, strict=True)))
        return own.forward(self, *inputs)

    def forward(self: ByPlace, *inputs: Tensor) -> Given:
        try:
            return _flat(self.raw(*inputs))
        except IndexError as error:  # torch.nn.functional.embedding says no more than this
            if str(error) != "index out of range in self":
                raise
            raise InputError(
                "an integer of the data is beyond the rows of the network's embedding: give the data that it is for, "
                "or an embedding with more rows"
            ) from error

    if len(shown) == len(names):  # torch.export names the inputs by it
        parameters = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", *shown)]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    methods = {"raw": raw, "forward": forward, "__module__": own.__module__}
    model.__class__ = type(own.__name__, (ByPlace, own), methods)
    return model


def _parameters(model: nn.Module) -> list[str]:
    """The arguments of a network that have a name."""
    kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return [name for name, one in inspect.signature(model.forward).parameters.items() if one.kind in kinds]


def named_inputs(model: nn.Module, given: TensorsSpec, origin: str) -> TensorsSpec:
    """`given` with the names that the network has for its inputs, where the data has them by place.

    Raises InputError where the names of several inputs are not the network's.
    """
    known = _parameters(model)
    if len(given.tensors) == 1:
        return TensorsSpec((replace(given.tensors[0], name=given.names[0] or INPUT),))
    if not all(given.names):
        places = [f"{INPUT}_{place}" for place in range(len(given.tensors))]
        names = known[: len(places)] if len(known) >= len(places) else places
        return TensorsSpec(tuple(replace(one, name=name) for one, name in zip(given.tensors, names, strict=True)))
    if not set(given.names) <= set(known):
        raise InputError(
            f"the batches hold {', '.join(given.names)} and {origin} takes {', '.join(known)}: give each input the "
            "name of an argument, or a tuple in their order, and call the target 'target'"
        )
    return given


def needed(model: nn.Module) -> list[str]:
    """The arguments that a network cannot do without."""
    known = inspect.signature(model.forward).parameters.values()
    kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return [one.name for one in known if one.default is one.empty and one.kind in kinds]


def apart(names: Sequence[str], taken: Sequence[str]) -> tuple[str, ...]:
    """`names`, each once and none of `taken`: an output that has the name of an input gets another."""
    found: list[str] = []
    for name in names:
        choices = (name, f"{name}_{OUTPUT}", *(f"{name}_{number}" for number in range(2, 2 + len(names) + len(taken))))
        found.append(next(one for one in choices if one not in (*taken, *found)))
    return tuple(found)
