"""Options that recipes and README do not use: each has a reason, and does what its help says."""

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import R2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "place", "value"),
    [
        # Margin's M and soft-min-max's alpha may want another rate than the weights: the paper steps them by 0.01.
        (["pretrain", "--reg", "margin", "--reg-lr", "0.3"], ["reg_lr"], 0.3),
        # The hinge divided by K is KURE's way to count; 1 is the paper's.
        (["pretrain", "--reg", "margin", "--margin-k", "4"], ["reg", "margin_k"], 4),
        # Steps of LSQ may fall to nothing at the rate of the weights (small data, leaky activations).
        (["qat", "{model}", "--quantizer-lr", "0.002"], ["quantizer_lr"], 0.002),
        # Centroids under fixed codes take a far lower rate than weights.
        (["palettize", "{model}", "--method", "shared", "--lut-lr", "0.01"], ["lut_lr"], 0.01),
    ],
    ids=["reg-lr", "margin-k", "quantizer-lr", "lut-lr"],
)
def test_a_rate_reaches_the_plan(
    command: list[str], place: list[str], value: object, r2: R2, trained: Path, tmp_path: Path
) -> None:
    words = [str(trained) if word == "{model}" else word for word in command]
    ran = r2(*words, "-o", tmp_path / "out.safetensors", "--dry-run", "--json")
    assert ran.code == 0, ran.err
    found: Any = json.loads(ran.out)["options"]
    for key in place:
        found = found[key]
    assert found == value


def _analyzed(r2: R2, *options: object) -> list[Any]:
    ran = r2("analyze", *options, "--json")
    assert ran.code == 0, ran.err
    layers: list[Any] = json.loads(ran.out)["files"][0]["layers"]
    return layers


@pytest.mark.slow
def test_one_thread_measures_what_several_do(r2: R2, trained: Path) -> None:
    assert _analyzed(r2, trained, "--threads", "1") == _analyzed(r2, trained, "--threads", "2")


@pytest.mark.slow
def test_layers_are_sorted_by_what_is_asked(r2: R2, trained: Path) -> None:
    def shown(by: str) -> list[str]:
        ran = r2("analyze", trained, "--view", "trained", "--sort", by, "--limit", "0")
        return [line.split()[0] for line in ran.out.splitlines()[2:12]]

    layers = {layer["layer"].removesuffix(".weight"): layer for layer in _analyzed(r2, trained, "--view", "trained")}
    by_size = sorted(layers, key=lambda name: -layers[name]["count"])
    assert shown("size")[0] == by_size[0] != shown("name")[0]
    assert sorted(shown("name")) == sorted(shown("size"))
