"""What range regularization buys, on real data: the steadiest of the numbers in benchmarks/digits.md, one seed each."""

import pytest
import torch

from r2cli import data
from r2cli.calibration import deployed
from r2cli.cli.main import invoke
from r2cli.ptq import post_training
from r2cli.storage import checkpoint
from r2cli.train import loop

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, checkpoint.Checkpoint]:
    """ResNet-8 on digits at 8x8, 15 epochs, without a regularizer and with L-inf."""
    folder = tmp_path_factory.mktemp("pair")
    made = {}
    for reg in ("none", "linf"):
        options = ["--model", "resnet8", "--size", "8", "--epochs", "15", "--batch-size", "32", "--lr", "0.2"]
        options += ["--weight-decay", "1e-4", "--reg", reg, "--seed", "7", "--device", "cpu", "--json"]
        invoke(["pretrain", *options, "-o", str(folder / f"{reg}.safetensors")])
        made[reg] = checkpoint.load(folder / f"{reg}.safetensors")
    return made


def test_linf_narrows_the_range_at_no_cost(pair: dict[str, checkpoint.Checkpoint]) -> None:
    plain, narrow = (pair[reg].history[0]["metrics"] for reg in ("none", "linf"))
    assert narrow["range_mean"] <= 0.65 * plain["range_mean"]
    # One point is the paper's claim; another is six of 597 images, the spread of one seed.
    assert narrow["top1"] >= plain["top1"] - 2


def test_two_bit_weights_survive_on_the_grid_that_was_regularized(pair: dict[str, checkpoint.Checkpoint]) -> None:
    top1 = {}
    for reg, made in pair.items():
        source = data.load("digits", spec=made.input)
        images = (batch for batch, _ in data.calibration(source, 512, CPU, 0))
        coded, _ = post_training.quantize(
            made, post_training.PtqSettings("none", 2, 8, post_training.UNFOLDED, {}), images, CPU
        )
        top1[reg] = loop.evaluate(deployed.network(coded), source.test, CPU)
    assert top1["linf"] >= top1["none"] + 55, top1
