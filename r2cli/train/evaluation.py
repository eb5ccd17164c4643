"""How good a network is on the test half of its data: by the task's metric, of torch or of an ONNX session alike."""

from collections.abc import Callable

import torch
from torch import nn

from r2cli import data
from r2cli.calibration import deployed
from r2cli.storage.checkpoint import Checkpoint
from r2cli.storage.input_spec import Given, count, places
from r2cli.train import distributed

EVALUATION_BATCH = 256


def evaluate(model: nn.Module, split: data.Split, device: torch.device) -> float:
    """Return the top-1 accuracy of `model` on `split`, in percent."""
    model.eval()
    return top1(model, split, device)


def float_top1(checkpoint: Checkpoint, source: data.Data, device: torch.device) -> float | None:
    """Return the top-1 of a checkpoint's network on the test images, in percent; None where it is not measured."""
    return evaluate(deployed.network(checkpoint).to(device), source.test, device) if source.measured else None


@torch.inference_mode()
def top1(
    predict: Callable[..., Given],
    split: data.Split,
    device: torch.device,
    *,
    advance: Callable[[int], None] = lambda images: None,
) -> float:
    """Return the top-1 in percent, on `split`, of a function from inputs to logits (n, classes), its first output."""
    correct, seen = 0, 0
    size = data.batch_that_fits(split, EVALUATION_BATCH)
    for images, labels in split.batches(size, device, share=distributed.share()):
        correct += int((places(predict(*places(images)))[0].argmax(1).to(device) == labels).sum())
        seen += count(images)
        advance(count(images))
    right, of = distributed.add_up(torch.tensor(correct, device=device), torch.tensor(seen, device=device))
    return 100 * int(right) / int(of)
