"""On a GPU: training, compression and proofs give there what they give on the CPU. Skipped where torch sees none.

R2_TEST_DEVICE=cpu runs them on the CPU, where they must pass too.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import r2cli
from r2cli import data
from r2cli.calibration import deployed
from r2cli.calibration.result import Result
from r2cli.storage import checkpoint
from r2cli.train import evaluation

WHERE = os.environ.get("R2_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(WHERE == "cuda" and not torch.cuda.is_available(), reason="torch sees no GPU")
DIGITS = "digits:256"


def top1(made: checkpoint.Checkpoint, where: str) -> float:
    found = evaluation.of_task(
        deployed.network(made).to(where), data.load("digits", spec=made.input), torch.device(where)
    )
    assert found is not None and found.top1 is not None
    return found.top1


@pytest.mark.parametrize("reg", ["none", "margin", "soft-minmax"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_network_learns_and_is_the_same_again(reg: str, precision: str) -> None:
    config = r2cli.PretrainConfig(reg=reg, epochs=2, precision=precision, device=WHERE)
    made, again = (r2cli.pretrain("resnet8", DIGITS, config) for _ in range(2))
    assert made.to_bytes() == again.to_bytes()
    assert made.epochs[-1].loss < made.epochs[0].loss
    assert top1(made.checkpoint, WHERE) == pytest.approx(top1(made.checkpoint, "cpu"), abs=0.5)


WORK: dict[str, tuple[Callable[..., Result], object]] = {
    "adaround": (r2cli.quantize, r2cli.PtqConfig(weight_bits=3, method="adaround", calibration=64, device=WHERE)),
    "brecq": (r2cli.quantize, r2cli.PtqConfig(weight_bits=3, method="brecq", calibration=64, device=WHERE)),
    **{
        name: (r2cli.finetune, r2cli.QatConfig(weight_bits=3, act_bits="4", method=name, epochs=1, device=WHERE))
        for name in ("lsq", "ewgs", "pact", "dorefa")
    },
    "dkm": (r2cli.palettize, r2cli.PalettizeConfig(bits=2, method="dkm", epochs=3, calibration=64, device=WHERE)),
}


@pytest.mark.parametrize("name", WORK)
def test_what_a_gpu_compressed_is_proved_on_the_cpu(name: str, trained: Path, tmp_path: Path) -> None:
    work, config = WORK[name]
    made = work(trained, DIGITS, config)
    r2cli.export(made, tmp_path / "made.onnx")
    assert r2cli.verify(tmp_path / "made.onnx", made, DIGITS, timed=False).passed
    assert top1(made.checkpoint, WHERE) == pytest.approx(top1(made.checkpoint, "cpu"), abs=0.5)
