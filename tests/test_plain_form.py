"""What other runtimes than the newest ONNX Runtime need of a file: see benchmarks/runtimes.md."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import r2cli
from r2cli.ptq.quantize import PtqResult


@pytest.fixture(scope="module")
def residual(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PtqResult, Path]:
    """The W8A8 file of a ResNet-8: sums read values that convolutions read too."""
    path = tmp_path_factory.mktemp("plain") / "model.onnx"
    made = r2cli.quantize(trained, "digits:64", r2cli.PtqConfig(calibration=64))
    r2cli.export(made, path)
    return made, path


@pytest.mark.slow
def test_every_reader_has_its_own_dequantizelinear(residual: tuple[PtqResult, Path]) -> None:
    graph = onnx.load(residual[1]).graph
    codes = {node.output[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    values = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in codes}
    readers = Counter(name for node in graph.node for name in set(node.input) if name in values)
    assert readers.keys() == values.keys() and set(readers.values()) == {1}
    assert len(values) - len(set(values.values())) == 3  # each block's input, read by two


@pytest.mark.slow
@pytest.mark.parametrize("palette", [False, True])
def test_large_integers_have_a_zero_point(palette: bool, residual: tuple[PtqResult, Path], trained: Path) -> None:
    """ONNX Runtime 1.17 to 1.23 aborts where they have none and `session.x64quantprecision` is set."""
    config = r2cli.PalettizeConfig(method="kmeans", bits=4, calibration=64)
    content = r2cli.export(r2cli.palettize(trained, "digits:64", config)) if palette else residual[1].read_bytes()
    graph = onnx.load_from_string(content).graph
    held = {each.name: each for each in graph.initializer}
    weights = [n for n in graph.node if n.op_type == "DequantizeLinear" and n.output[0].endswith(".weight")]
    assert len(weights) == 10
    for node in weights:
        zero, scale = (numpy_helper.to_array(held[node.input[place]]) for place in (2, 1))
        assert zero.dtype == np.int8 and zero.shape == scale.shape and not zero.any()


@pytest.mark.slow
def test_the_proof_sees_a_fault_in_a_copy(residual: tuple[PtqResult, Path], tmp_path: Path) -> None:
    made, path = residual
    assert r2cli.verify(path, made, "digits:64", timed=False).passed
    file, wrong = onnx.load(path), tmp_path / "wrong.onnx"
    copy = next(node for node in file.graph.node if ".copy2" in node.output[0])
    scale = next(each for each in file.graph.initializer if each.name == copy.input[1])
    file.graph.initializer.append(numpy_helper.from_array(1.01 * numpy_helper.to_array(scale), "fault"))
    copy.input[1] = "fault"
    onnx.save(file, wrong)
    failed = [check.name for check in r2cli.verify(wrong, made, "digits:64", timed=False).checks if not check.passed]
    assert "same grids" in failed
