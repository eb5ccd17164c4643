"""A strided convolution of one pixel over few channels: torch crashes as it trains one in channels-last memory."""

import copy

import torch
from torch import Tensor, nn

import r2cli
from r2cli.graph.read import trace
from r2cli.train import loop

CPU = torch.device("cpu")


class Branches(nn.Module):
    """Two ways from the image, as RepVGG has them, and one over enough channels."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(3, 16, 1, 2)
        self.next, self.head = nn.Conv2d(16, 16, 1, 2), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.next(torch.relu(self.wide(x) + self.narrow(x))).mean((2, 3)))


def _layouts(model: nn.Module, images: Tensor) -> dict[str, bool]:
    """Whether the input or the weight of each convolution is in channels-last memory."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):

            def note(module: nn.Module, given: tuple[Tensor, ...], _: Tensor, name: str = name) -> None:
                assert isinstance(module, nn.Conv2d)
                # The strides say it, as torch reads them: of axes of size 1 nothing else does.
                found[name] = any(one.stride()[1] == 1 and one.stride()[3] != 1 for one in (*given, module.weight))

            module.register_forward_hook(note)
    model(images)
    return found


def test_it_runs_in_plain_memory_and_all_others_do_not() -> None:
    images = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    assert _layouts(loop.to_device(Branches(), CPU), images) == {"wide": True, "narrow": False, "next": True}


def test_so_it_does_in_a_graph_that_was_read() -> None:
    images = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    assert not _layouts(trace(Branches(), images), images)["narrow"]


def test_its_gradients_are_those_of_plain_memory() -> None:
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    torch.manual_seed(0)
    plain = Branches()
    fast = loop.to_device(copy.deepcopy(plain), CPU)
    for model, given in ((plain, images), (fast, images.to(memory_format=torch.channels_last))):
        nn.functional.cross_entropy(model(given), labels).backward()
    for (name, one), other in zip(plain.named_parameters(), fast.parameters(), strict=True):
        assert one.grad is not None and float(one.grad.abs().max()) > 0
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_every_way_of_learning_gets_through_it() -> None:
    """It ended the process before: there is nothing more to see here than that all return."""
    images = [(torch.randn(16, 3, 32, 32), torch.arange(16) % 4) for _ in range(2)]
    data = r2cli.load_data(images)
    made = r2cli.pretrain(Branches(), data, r2cli.PretrainConfig(epochs=1, batch_size=16)).checkpoint
    for method in ("adaround", "brecq"):
        r2cli.quantize(made, data, r2cli.PtqConfig(weight_bits=4, method=method))
    r2cli.quantize(made, data, r2cli.PtqConfig(target_bits=4))
    r2cli.finetune(made, data, r2cli.QatConfig(epochs=1, batch_size=16))
