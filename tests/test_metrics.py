"""Metrics by name against scikit-learn and plain formulas; the user's own, and what is none."""

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as peers

from r2cli.data import metrics, torchmetrics
from r2cli.errors import InputError


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def measured(metric: metrics.Metric, outputs: Any, target: Any, batch: int = 7) -> metrics.Measured:
    meter, count = metric.start(), len(metrics.first(outputs))
    for start in range(0, count, batch):
        part = slice(start, start + batch)
        own = outputs[part] if isinstance(outputs, torch.Tensor) else {k: v[part] for k, v in outputs.items()}
        metrics.updated(metric, meter, own, None if target is None else target[part])
    return metrics.value_of(metric, meter)


def value(name: str, outputs: Any, target: Any) -> float:
    return measured(metrics.METRICS[name], outputs, target).value


def test_decisions_among_classes_as_scikit_learn_has_them() -> None:
    logits, labels = drawn(50, 7), torch.arange(50) % 7
    decided, share = logits.argmax(1).numpy(), logits.softmax(1).numpy()
    assert value("top1", logits, labels) == pytest.approx(100 * peers.accuracy_score(labels, decided))
    five = peers.top_k_accuracy_score(labels, share, k=5)
    assert value("top5", logits, labels) == pytest.approx(100 * five)
    assert value("f1", logits, labels) == pytest.approx(100 * peers.f1_score(labels, decided, average="macro"))
    area = peers.roc_auc_score(labels, share, multi_class="ovr", average="macro")
    assert value("auroc", logits, labels) == pytest.approx(100 * area)
    for score in (drawn(40, 1, seed=3).round(decimals=1), drawn(40, seed=4).round(decimals=1)):  # with equal scores
        two = torch.arange(40) % 2
        assert value("auroc", score, two) == pytest.approx(100 * peers.roc_auc_score(two, score.reshape(-1)))
        assert value("f1", score, two) == pytest.approx(
            100 * peers.f1_score(two, (score.reshape(-1) > 0).int(), average="macro")
        )


def test_maps_of_classes_leave_out_what_is_not_labelled() -> None:
    logits = drawn(9, 4, 5, 6)
    labels = torch.randint(0, 4, (9, 5, 6), generator=torch.Generator().manual_seed(1))
    labels[0], labels[1, 2] = 255, -1
    counted = ((labels >= 0) & (labels < 4)).numpy()
    wanted = peers.jaccard_score(labels.numpy()[counted], logits.argmax(1).numpy()[counted], average="macro")
    assert value("miou", {"out": logits, "aux": drawn(9, 1)}, labels) == pytest.approx(100 * wanted)


def test_numbers_as_scikit_learn_has_them() -> None:
    found, wanted = drawn(30, 3), drawn(30, 3, seed=1)
    assert value("mse", found, wanted) == pytest.approx(peers.mean_squared_error(wanted.numpy(), found.numpy()))
    assert value("mae", found, wanted) == pytest.approx(peers.mean_absolute_error(wanted.numpy(), found.numpy()))
    assert value("r2", found, wanted) == pytest.approx(peers.r2_score(wanted.double().numpy(), found.double().numpy()))
    column = drawn(30, 1)
    assert value("mse", column, wanted[:, 0]) == pytest.approx(float((column[:, 0] - wanted[:, 0]).square().mean()))
    picture = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    near = (picture + 0.1).clamp(0, 1)
    each = [-10 * np.log10(float((a - b).square().mean())) for a, b in zip(near, picture, strict=True)]
    assert value("psnr", near, picture) == pytest.approx(np.mean(each), rel=1e-5)
    assert value("psnr", 255 * near, 255 * picture) == pytest.approx(np.mean(each), rel=1e-5)


@pytest.mark.parametrize("far", [0.0, 1e8, 1.7e9])
def test_r2_far_from_zero_and_of_constants_as_scikit_learn_has_it(far: float) -> None:
    wanted = drawn(30, 3, seed=1).double() + far
    found = wanted + 0.3 * drawn(30, 3)
    wanted[:, 1] = found[:, 2] = wanted[:, 2] = 3
    assert value("r2", found, wanted) == pytest.approx(peers.r2_score(wanted.numpy(), found.numpy()), rel=1e-6)
    assert value("r2", wanted, wanted) == 1
    assert value("r2", found, torch.full_like(found, 3.3)) == 0  # whose mean is rounded
    with pytest.raises(InputError, match="nan"):
        value("r2", found * float("nan"), wanted)


def test_a_value_is_told_with_its_name_and_unit() -> None:
    told = {"top1": "top-1 61.25 %", "miou": "mIoU 61.25", "psnr": "PSNR 61.25 dB", "r2": "R2 61.25"}
    assert {name: metrics.METRICS[name].shown(61.25) for name in told} == told
    assert metrics.METRICS["mse"].shown(0.0012345) == "MSE 0.001234"


OWN = """
class Largest:
    def __init__(self, start=0.0):
        self.value = start
    def update(self, outputs, targets):
        self.value = max(self.value, float(outputs["a"].max()))
    def compute(self):
        return {"largest": self.value, "twice": 2 * self.value}

def mean(outputs, targets, scale=1.0):
    return scale * outputs.mean()

def raises(outputs, targets):
    raise KeyError("boxes")

def nan(outputs, targets):
    return float("nan")

def text(outputs, targets):
    return "good"

def nothing(outputs, targets):
    return {}

class Half:
    def update(self, outputs, targets): ...
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def test_the_user_s_own_metric_is_a_function_or_a_class(own: Path) -> None:
    x = drawn(10, 2)
    found = measured(metrics.named(f"{own}:mean", ["scale=2"], lower=True), x, None)
    assert found.value == pytest.approx(2 * float(x.mean()), rel=1e-6) and not found.metric.higher
    found = measured(metrics.named(f"{own}:Largest", ["start=-9.0"]), {"a": x, "b": x}, None)
    assert found.value == pytest.approx(float(x.max())) and found.others["twice"] == 2 * found.value


BAD = {
    "raises": "own.py:raises raised KeyError .*boxes.*: it takes",
    "nan": "own.py:nan gave nan: it must be a finite number",
    "text": "own.py:text gave a str: it must return a number",
    "nothing": "own.py:nothing gave no number",
}


@pytest.mark.parametrize("name", BAD)
def test_a_metric_that_gives_no_number_is_named(name: str, own: Path) -> None:
    with pytest.raises(InputError, match=BAD[name]):
        measured(metrics.named(f"{own}:{name}"), drawn(3, 2), None)


def test_names_that_are_no_metric(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, why in {
        "top2": "'top2'.*top1",
        f"{own}:Half": "is a class without update and compute",
        f"{own}:men": "'men'.*mean",
        "torchmetrics:Accuracy": "needs torchmetrics, which is not installed",
    }.items():
        with pytest.raises(InputError, match=why):
            metrics.named(name)
    with pytest.raises(InputError, match="mse takes neither"):
        metrics.named("mse", lower=True)
    with pytest.raises(InputError, match=r"Largest: .*'size'.*: give --metric-arg NAME=VALUE"):
        metrics.named(f"{own}:Largest", ["size=3"])


def test_torchmetrics_by_the_names_of_their_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    library = types.ModuleType("torchmetrics")

    class Mean:
        higher_is_better: bool | None = None

        def __init__(self, scale: float = 1.0) -> None:
            self.values: list[float] = []
            self.scale = scale

        def update(self, outputs: torch.Tensor, target: Any) -> None:
            self.values += outputs.reshape(-1).tolist()

        def compute(self) -> torch.Tensor:
            return self.scale * torch.tensor(self.values).mean()

    library.Mean, library.__all__ = Mean, ["Mean"]  # type: ignore[attr-defined]
    library.__spec__ = types.SimpleNamespace(name="torchmetrics")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "torchmetrics", library)
    for name in torchmetrics.DOMAINS:
        monkeypatch.setitem(sys.modules, f"torchmetrics.{name}", None)
    domain = types.ModuleType("torchmetrics.regression")
    domain.MeanError = type("MeanError", (Mean,), {"higher_is_better": False})  # type: ignore[attr-defined]
    domain.__all__ = ["MeanError"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchmetrics.regression", domain)
    assert measured(metrics.named("torchmetrics:Mean", ["scale=3"]), torch.ones(4, 1), None).value == 3
    assert metrics.named("torchmetrics:Mean").higher and not metrics.named("torchmetrics:Mean", lower=True).higher
    assert not metrics.named("torchmetrics:MeanError").higher  # of one of its packages, and as it says itself
    with pytest.raises(
        InputError, match="metric of torchmetrics 'Maen': did you mean 'Mean'.*known are Mean, MeanError"
    ):
        metrics.named("torchmetrics:Maen")


WRONG: dict[str, tuple[str, torch.Tensor, Any, str]] = {
    "labels outside": ("top1", drawn(4, 3), torch.tensor([0, 1, 2, 3]), "label 3 is none of the network's 3 classes"),
    "labels below": ("top1", drawn(4, 3), torch.tensor([0, -1, 2, 2]), "label -1 is none of the network's 3 classes"),
    "one number": ("top1", drawn(4, 1), torch.tensor([0, 1, 0, 1]), "or, for a network of one number, give --loss bce"),
    "no target": ("top1", drawn(4, 3), None, "labels are integers, and the target is missing"),
    "numbers as labels": ("top1", drawn(4, 3), drawn(4), "the target is float32"),
    "a map for labels": (
        "top1",
        drawn(4, 3, 5, 5),
        torch.zeros(4, dtype=torch.long),
        r"gives \(4, 3, 5, 5\) for labels",
    ),
    "no target to compare": ("mse", drawn(4, 3), None, "the target is missing"),
    "another shape": ("mse", drawn(4, 3), drawn(4, 2), r"gives \(4, 3\) and the target is \(4, 2\)"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_targets_that_a_metric_does_not_take(kind: str) -> None:
    name, outputs, target, why = WRONG[kind]
    with pytest.raises(InputError, match=why):
        value(name, outputs, target)
