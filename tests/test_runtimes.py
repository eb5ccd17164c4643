"""The runners of benchmarks/runtimes.py: the default file of every width in three runtimes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import r2cli
from r2cli.deploy.engines import ENGINES
from r2cli.storage import checkpoint

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
WIDTHS = ("W8A8", "W4A8", "W3A8", "W2A8", "W1A8")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def matrix() -> Iterator[Any]:
    """The module benchmarks/runtimes.py; its twin in_python.py is `in_python` in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import runtimes

        yield runtimes


@pytest.fixture(scope="module")
def files(trained: Path, matrix: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, and files of a ResNet-8 on digits at every width."""
    folder, made = tmp_path_factory.mktemp("files"), checkpoint.load(trained)
    source = r2cli.load_data("digits:200", size=8)
    images = next(iter(source.test.batches(200, torch.device("cpu"))))[0]
    np.save(folder / "images.npy", images.contiguous().numpy())
    for form in (matrix.FLOAT, *WIDTHS):
        for end, content in matrix.content(form, made, source).items():
            (folder / f"{form}.{end}").write_bytes(content)
    return folder


def test_every_width_is_tested(matrix: Any) -> None:
    assert tuple(matrix.WIDTHS) == WIDTHS


@pytest.mark.parametrize("form", WIDTHS)
@pytest.mark.parametrize("loader", ["onnxruntime", "openvino plain", "reference"])
def test_the_default_file_of_every_width_runs(form: str, loader: str, matrix: Any, files: Path) -> None:
    if "openvino" in loader and not ENGINES["openvino"].installed:
        pytest.skip("openvino is not installed")
    images, path = np.load(files / "images.npy"), str(files / f"{form}.onnx")
    if loader == "reference":  # slow, and without a DequantizeLinear of opset 13
        images, path = images[:8], str(files / f"{form}.{matrix.OPSET_19}")
    expected = matrix.in_python.outputs(matrix.in_python.onnxruntime(path, images.shape, optimise=False), images)
    found = matrix.in_python.outputs(matrix.in_python.LOADERS[loader](path, (1, *images.shape[1:])), images)
    near = matrix.beside(found, expected)
    assert near["same"] >= matrix.ENOUGH and near["db"] > 30, near
    wrong = matrix.beside(np.roll(found, 1, axis=0), expected)  # each image's answer is its neighbour's
    assert wrong["same"] < 90 and wrong["db"] < 10, wrong


def test_an_order_ends_with_measures_or_a_reason(matrix: Any, files: Path, tmp_path: Path) -> None:
    order = {"file": str(files / "W4A8.onnx"), "beside": str(files / "float32.onnx"), "seconds": 0.0}
    order |= {"images": str(files / "images.npy"), "result": str(tmp_path / "result.npy")}
    found = matrix.in_python.measured("onnxruntime", order)
    assert found["ms"] > 0 and found["float_ms"] > 0 and matrix.ratio(found) == found["ms"] / found["float_ms"]
    assert np.load(tmp_path / "result.npy").shape == (len(np.load(files / "images.npy")), 10)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes((files / "W4A8.onnx").read_bytes()[:500])
    told = matrix.in_python.measured("onnxruntime", order | {"file": str(broken)})
    assert told["failed"].startswith("loading: ")
    assert matrix.nearness(json.loads(json.dumps(told)), {}) == "[1]"
