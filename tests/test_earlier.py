"""Checkpoints of r2 0.1.0, made by it: `r2 pretrain --width 0.01 --epochs 12 --reg margin`, `r2 ptq --weight-bits 4`.

It told of both files what is expected here.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import r2cli
from conftest import R2
from r2cli import models
from r2cli.calibration import earlier
from r2cli.errors import InputError
from r2cli.quantized.grid import Grid
from r2cli.storage.checkpoint import Checkpoint
from r2cli.storage.input_spec import InputSpec

HERE = Path(__file__).parent / "data"
FLOAT, CODES = HERE / "float-0.1.safetensors", HERE / "w4a8-0.1.safetensors"


@pytest.mark.parametrize(("path", "right"), [(FLOAT, 323), (CODES, 306)], ids=["float", "w4a8"])
def test_a_checkpoint_of_the_first_version_has_the_accuracy_that_it_had(path: Path, right: int, r2: R2) -> None:
    with safe_open(path, framework="pt") as file:
        made = json.loads(file.metadata()["r2"])
    assert made["history"][-1]["versions"]["r2cli"] == "0.1.0" and "args" not in made["model"]
    ran = r2("evaluate", path, "--json")
    assert ran.code == 0 and json.loads(ran.out)["top1"] == pytest.approx(100 * right / 597)


@pytest.mark.slow
def test_its_codes_are_exported_and_proved(tmp_path: Path) -> None:
    r2cli.export(CODES, tmp_path / "codes.onnx")
    assert r2cli.verify(tmp_path / "codes.onnx", CODES).passed


def _residual(grids: Mapping[str, Grid]) -> Checkpoint:
    spec = models.spec("resnet8", classes=10, channels=1, size=8)
    floats = models.build(spec).state_dict()
    return Checkpoint(spec, InputSpec(1, 8, 8, (0.0,), (1.0,)), (), floats, activations=grids)


def _grid(scale: float) -> Grid:
    return Grid(torch.tensor(scale), torch.tensor(0, dtype=torch.int32), 8, False)


def test_grids_find_the_values_that_had_other_names() -> None:
    before = {"add": _grid(1.0), "add_2": _grid(2.0), "stages_0_0_relu2": _grid(3.0)}
    found = earlier.by_todays_names(_residual(before)).activations
    assert found == {"stages_0_0_add": before["add"], "stages_2_0_add": before["add_2"]} | {
        "stages_0_0_relu2": before["stages_0_0_relu2"]
    }
    todays = _residual(found)
    assert earlier.by_todays_names(todays) is todays


def test_a_grid_without_a_place_says_so() -> None:
    for grids in ({"gone": _grid(1.0)}, {"add": _grid(1.0), "stages_0_0_add": _grid(2.0)}):
        with pytest.raises(InputError, match=r"has no place in the graph .*: quantize the float checkpoint again"):
            earlier.by_todays_names(_residual(grids))


def test_random_numbers_are_left_as_they_were() -> None:
    given = _residual({"add": _grid(1.0)})
    state = torch.get_rng_state()
    earlier.by_todays_names(given)
    assert torch.equal(torch.get_rng_state(), state)
