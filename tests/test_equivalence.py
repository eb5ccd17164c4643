"""A graph is compared with the network that it was read from, before anything is done with it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from r2cli.errors import InputError
from r2cli.graph import equivalence
from r2cli.graph.read import trace
from r2cli.ptq import post_training
from r2cli.storage.checkpoint import Checkpoint, InputSpec, ModelSpec

SPEC = InputSpec(3, 8, 8, (0.5,) * 3, (0.25,) * 3)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.hardswish(self.second(F.silu(self.first(x)))).mean((2, 3)))


def _without_silu(net: fx.GraphModule) -> fx.GraphModule:
    product = next(node for node in net.graph.nodes if node.target is torch.mul)
    product.replace_all_uses_with(product.args[0])
    net.recompile()
    return net


@pytest.mark.slow
def test_a_graph_of_another_function_is_r2s_fault_and_names_the_module() -> None:
    model = Small().eval()
    equivalence.require_same(trace(model, SPEC.blank(2)), model, SPEC)
    with pytest.raises(equivalence.Misread, match=r"the value of 'second' is the first.*--act-bits none") as raised:
        equivalence.require_same(_without_silu(trace(model, SPEC.blank(2))), model, SPEC)
    assert raised.value.exit_code == 3 and not isinstance(raised.value, InputError)


@pytest.mark.slow
def test_where_weights_alone_are_wanted_a_misread_graph_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equivalence, "trace", lambda model, example, _: _without_silu(trace(model, SPEC.blank(2))))
    model = Small()
    spec = ModelSpec("small.py:Small", 10, factory=Small)
    made = Checkpoint(spec, SPEC, tuple("0123456789"), dict(model.state_dict()))
    settings = post_training.PtqSettings("none", 8, None, post_training.CHANNEL, {})
    coded, _ = post_training.quantize(made, settings, None, torch.device("cpu"))
    assert not coded.folded and set(coded.coded) == {"first.weight", "second.weight", "head.weight"}
    with pytest.raises(equivalence.Misread):
        on_grids = post_training.PtqSettings("none", 8, 8, post_training.CHANNEL, {})
        post_training.quantize(made, on_grids, [torch.randn(2, *SPEC.shape)], torch.device("cpu"))


def test_random_inputs_are_the_same_each_time_and_in_the_inputs_range() -> None:
    inputs = equivalence.random_inputs(nn.Identity(), SPEC, 3)
    again = equivalence.random_inputs(nn.Identity(), SPEC, 3)
    assert isinstance(inputs, Tensor) and isinstance(again, Tensor) and torch.equal(inputs, again)
    assert inputs.shape == (3, 3, 8, 8) and inputs.std() > 0.5
    assert inputs.min() >= -2 and inputs.max() <= 2  # (0 - mean) / std, (1 - mean) / std
    text = InputSpec(3, 8, 8, (), (), tokenizer="one")
    tokens = equivalence.random_inputs(nn.Embedding(50, 4), text, 2)
    assert isinstance(tokens, Tensor)
    assert tokens.dtype == torch.int64 and tokens[:, 0].max() < 50 and len(tokens[:, 0].unique()) > 4
    assert tokens[0, 1].all() and not tokens[1, 1].all()
