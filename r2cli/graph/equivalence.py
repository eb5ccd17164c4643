"""Whether a graph that was read is the network that was given: both run on the same inputs, each output compared.

All that r2 does with a network it does with the graph, the proof's simulation included, so a fault in reading would
pass every later check.
"""

import copy
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from r2cli.errors import R2Error
from r2cli.graph.read import WEIGHTS_ALONE, trace
from r2cli.storage.input_spec import Given, NetworkInput, TensorsSpec, each, places

TOLERANCE = 1e-5  # of an output's largest value: the order of float sums is all that may differ
SEED = 0


class Misread(R2Error):
    """A graph that is not the network's function: a fault of r2's."""


def read(model: nn.Module, spec: NetworkInput, architecture: Hashable | None = None) -> fx.GraphModule:
    """The graph of a float network, as `trace` reads it, compared with `model`.

    Raises Unreadable as `trace` does, and Misread where the two are not the same function.
    """
    return require_same(trace(model, spec.blank(2), architecture), model, spec)


@torch.no_grad()
def require_same(net: fx.GraphModule, model: nn.Module, spec: NetworkInput) -> fx.GraphModule:
    """`net`, if it gives what `model` gives, both in evaluation, on two random inputs. Raises Misread otherwise."""
    inputs = random_inputs(model, spec, 2)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    inputs = each(inputs, lambda one: one.to(device))
    # In a deep network float32's own rounding may pass the bound; a graph of another function differs in float64 too.
    if _distance(net, model, inputs) > TOLERANCE and _distance(*_in_double(net, model), _double(inputs)) > TOLERANCE:
        at = _first_difference(net, model, inputs)
        where = f"the value of '{at}' is the first that differs" if at else "its result differs"
        raise Misread(
            f"r2 reads {type(model).__name__} as another function than it is ({where}), which is r2's fault and worth "
            f"a report: write what is there another way, {WEIGHTS_ALONE}"
        )
    return net


def random_inputs(model: nn.Module, spec: NetworkInput, count: int) -> Given:
    """`count` inputs, the same in every run: pixels that are normal about the middle grey, tokens of any kind, or
    normal numbers and the integers that the data has.

    Zeros would hide what is wrong: what multiplies them, and ReLUs.
    """
    generator = torch.Generator().manual_seed(SEED)
    if isinstance(spec, TensorsSpec):
        return spec.random(count, generator)
    if not spec.is_text:
        pixels = (0.5 + 0.25 * torch.randn(count, *spec.shape, generator=generator)).clamp_(0, 1)
        mean, std = (torch.tensor(each).reshape(-1, 1, 1) for each in (spec.mean, spec.std))
        return (pixels - mean) / std
    # Ids that every table has: of words, of positions, and not of the two types.
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings > 2]
    most = min(sizes, default=2)
    tokens = torch.zeros(count, *spec.shape, dtype=torch.int64)
    tokens[:, 0] = torch.randint(most, tokens[:, 0].shape, generator=generator)
    tokens[:, 1] = 1
    tokens[1:, 1, 3 * spec.size // 4 :] = 0  # a shorter text
    tokens[:, 2, spec.size // 2 :] = 1  # and two sentences
    return tokens


def _distance(net: nn.Module, model: nn.Module, inputs: Given) -> float:
    """The largest difference of two networks' outputs, relative to the largest value of the output; infinite where one
    is finite and the other is not."""
    worst = 0.0
    for found, expected in zip(_run(net, inputs), _run(model, inputs), strict=True):
        worst = max(worst, relative(found, expected))
    return worst


def _run(model: nn.Module, inputs: Given) -> list[Tensor]:
    return list(tensors(model(*places(each(inputs, torch.clone)))))  # it may write into its inputs


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value that is expected; of integers the share that differs.

    It is infinite for another shape, and where one is finite and the other is not.
    """
    if found.shape == expected.shape and not expected.is_floating_point():
        return float((found != expected).double().mean()) if expected.numel() else 0.0
    finite = torch.isfinite(expected)
    if found.shape != expected.shape or not torch.equal(torch.isfinite(found), finite):
        return torch.inf
    found, expected = found[finite].double(), expected[finite].double()
    if not expected.numel():
        return 0.0
    return float((found - expected).abs().max()) / (float(expected.abs().max()) or 1.0)


def tensors(outputs: Any) -> Iterator[Tensor]:
    """The tensors of a network's outputs, in order: one, several, by name, or nested."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, dict | list | tuple):
        for one in outputs.values() if isinstance(outputs, dict) else outputs:
            yield from tensors(one)


def _double(inputs: Given) -> Given:
    return each(inputs, lambda one: one.double() if one.is_floating_point() else one)


def _in_double(net: nn.Module, model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Copies of both in float64."""
    return copy.deepcopy(net).double(), copy.deepcopy(model).double()


def _first_difference(net: nn.Module, model: nn.Module, inputs: Given) -> str | None:
    """The first module, in the order in which the network runs, whose value is another one in the graph."""
    seen, expected = _module_values(net, inputs), _module_values(model, inputs)
    for name, values in expected.items():
        own = seen.get(name, [])
        if len(own) == len(values) and any(
            relative(one, other) > TOLERANCE for one, other in zip(own, values, strict=True)
        ):
            return name
    return None


def _module_values(model: nn.Module, inputs: Given) -> dict[str, list[Tensor]]:
    """What each module without parts gives, one for each time it runs, by name, in the order of first runs."""
    values: dict[str, list[Tensor]] = {}
    hooks = []
    for name, module in model.named_modules():
        if next(module.children(), None) is None:

            def note(_module: nn.Module, _given: Any, result: Any, name: str = name) -> None:
                values.setdefault(name, []).extend(one.clone() for one in tensors(result))

            hooks.append(module.register_forward_hook(note))
    _run(model, inputs)
    for hook in hooks:
        hook.remove()
    return values
