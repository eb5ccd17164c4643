"""Pictures of reports: what is drawn, in which colours, and when the commands write them."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conftest import R2
from r2cli.analysis import plots, style

BLUE, ORANGE = ([int(each[i : i + 2], 16) for i in (1, 3, 5)] for each in style.COLOURS[:2])


def pixels(content: bytes | None) -> np.ndarray[Any, Any]:
    assert content is not None
    image = np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"))
    assert not image[0, 0, 3] and not image[-1, -1, 3], "the background is transparent"
    return image


def area(image: np.ndarray[Any, Any], colour: list[int]) -> int:
    return int((image[..., :3] == colour).all(-1)[image[..., 3] > 0].sum())


def _record(row: str, column: str, *values: float) -> dict[str, Any]:
    mean = sum(values) / len(values)
    least, greatest = min(values), max(values)
    return {"reg": row, "column": column, "n": len(values), "mean": mean, "sd": None, "least": least} | {
        "greatest": greatest,
        "values": list(values),
    }


def test_a_training_has_a_panel_for_all_that_was_measured() -> None:
    epochs = [{"epoch": n, "loss": 2.0 / n, "penalty": 0.0, "value": 10.0 * n} for n in range(1, 6)]
    two = pixels(plots.curves(epochs, title="a", metric="top1"))
    ranged = [epoch | {"range_mean": 2.0, "range_max": 4.0 + epoch["epoch"]} for epoch in epochs]
    three = pixels(plots.curves(ranged, title="a", metric="top1"))
    assert three.shape[1] == pytest.approx(1.5 * two.shape[1], abs=2)
    assert area(two, BLUE) and not area(two, ORANGE) and area(three, ORANGE)


def test_layers_have_bars_as_long_as_their_decibels_and_a_colour_for_each_width() -> None:
    measured = [{"layer": f"$conv_{n}", "sqnr": sqnr, "bits": bits} for n, (sqnr, bits) in enumerate(DECIBELS)]
    image = pixels(plots.of_report({"layers": measured, "checkpoint": "x"}))
    assert area(image, BLUE) == pytest.approx(3 * area(image, ORANGE), rel=0.15)
    assert plots.of_report({"layers": [{"layer": "a", "bits": 4, "sqnr": None}]}) is None


DECIBELS = [(30.0, 8), (30.0, 8), (20.0, 4)]


def test_tables_are_bars_of_means_and_texts_are_left_out() -> None:
    grouped = [_record(row, f"{bits} top-1 %", low, low + 20) for row in "ab" for bits, low in (("W8", 40), ("W4", 20))]
    texts = [{"reg": "a", "column": "proof", "n": 1, "mean": None, "values": ["passed"]}]
    alone = pixels(plots.tables([("title", ["top-1 %"], grouped), ("", ["proof"], texts)]))
    assert alone.shape == pixels(plots.tables([("title", ["top-1 %"], grouped)])).shape
    more = pixels(plots.tables([("title", ["top-1 %", "bytes"], [*grouped, _record("a", "bytes", 1000.0)])]))
    assert more.shape[0] > alone.shape[0] and plots.tables([("", ["proof"], texts)]) is None


def test_pretrain_draws_its_curves_where_it_is_asked_to(
    r2: R2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["pretrain", "--model", "resnet8", "--size", "8", "--epochs", "1", "--data", "digits:64", "--device", "cpu"]
    assert r2(*line, "-o", "b.safetensors", "--plot").code == 0
    assert area(pixels(Path("b.png").read_bytes()), BLUE)
    Path("c.png").write_bytes(b"mine")
    ran = r2(*line, "-o", "c.safetensors", "--plot")
    assert ran.code == 2 and "c.png" in ran.err and Path("c.png").read_bytes() == b"mine"


@pytest.mark.slow
def test_ptq_draws_its_layers_also_where_a_gate_fails(r2: R2, trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "codes.safetensors"
    ran = r2("ptq", trained, "-o", output, "--max-bytes", 10, "--plot", "--json")
    assert ran.code == 1 and len(json.loads(ran.out)["layers"]) == 10
    assert area(pixels((tmp_path / "codes.png").read_bytes()), BLUE)
