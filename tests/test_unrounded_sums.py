"""OpenVINO adds convolutions before they are rounded: the file as it computes it, and what the proof makes of that."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import r2cli
from r2cli.calibration import deployed
from r2cli.calibration.result import Result
from r2cli.data import own
from r2cli.deploy import engines, likeness, runtime, second_engine, unrounded_sums
from r2cli.deploy.engines import ENGINES, Arrays

needs_openvino = pytest.mark.skipif(not ENGINES["openvino"].installed, reason="openvino is not installed")


class Blocks(nn.Module):
    """Inverted residuals: what is added is a convolution's result, and so is what it is added to."""

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 4, 1)
        self.wide = nn.ModuleList(nn.Conv2d(16, 32, 1) for _ in range(blocks))
        self.back = nn.ModuleList(nn.Conv2d(32, 16, 1) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for wide, back in zip(self.wide, self.back, strict=True):
            x = x + back(F.relu(wide(x)))
        found: Tensor = self.last(x)
        return found


@pytest.fixture(scope="module")
def made() -> tuple[Result, Tensor]:
    """A network with four sums, of few bits, so that no processor's products overflow; and what it is run on."""
    torch.manual_seed(0)
    x = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return r2cli.quantize(Blocks().eval(), own.to_data("f", ([x], [x])), r2cli.PtqConfig(weight_bits=4)), x


@pytest.fixture(scope="module")
def residual(made: tuple[Result, Tensor], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Arrays]]:
    path = tmp_path_factory.mktemp("residual") / "n.onnx"
    r2cli.export(made[0], path)
    return path, [{"input": made[1].numpy()}]


def of_unrounded(path: Path, given: list[Arrays]) -> Arrays:
    file = unrounded_sums.unrounded(runtime.read(path))
    assert file is not None
    onnx.checker.check_model(file)
    own_session = runtime.session(file.SerializeToString(), optimise=False)
    return engines.together(engines.of_session(own_session, "unrounded"), given)


def test_each_sum_has_one_convolution_that_is_clipped_and_not_rounded(residual: tuple[Path, list[Arrays]]) -> None:
    path, given = residual
    before, after = runtime.read(path), unrounded_sums.unrounded(runtime.read(path))
    assert after is not None
    kinds = [[node.op_type for node in file.graph.node] for file in (before, after)]
    gone, come = (kinds[0].count(kind) - kinds[1].count(kind) for kind in ("DequantizeLinear", "Clip"))
    assert (gone, come) == (4, -4)
    usual = engines.together(ENGINES["onnxruntime"].load(path, 1, False), given)
    assert 20 < likeness.least(likeness.compared(of_unrounded(path, given), usual, noise_db=30)) < 50
    few = onnx.ModelProto()
    few.CopyFrom(before)
    sums = [node for node in few.graph.node if node.op_type == "Add"]
    few.graph.output.extend(onnx.ValueInfoProto(name=name) for node in sums for name in node.input)
    assert unrounded_sums.unrounded(few) is None, "what else reads a rounded value hinders it"


@needs_openvino
def test_openvino_computes_that(residual: tuple[Path, list[Arrays]]) -> None:
    path, given = residual
    found = engines.together(ENGINES["openvino"].load(path, 1, False), given)
    usual = engines.together(ENGINES["onnxruntime"].load(path, 1, False), given)
    own_db, file_db = (
        likeness.least(likeness.compared(found, one, noise_db=30)) for one in (of_unrounded(path, given), usual)
    )
    assert own_db > 50 > file_db, (own_db, file_db)


def test_the_proof_takes_it_for_a_reason_and_no_other_fault(
    residual: tuple[Path, list[Arrays]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With bounds that this small network is beyond, as a deep one on coarse grids is beyond 20 dB."""
    path, given = residual
    monkeypatch.setattr(second_engine, "SQNR_DB", 50.0)
    monkeypatch.setattr(second_engine, "KERNELS_DB", 50.0)
    exact, plain = of_unrounded(path, given), engines.together(ENGINES["onnxruntime"].load(path, 1, False), given)

    def told(factor: float, plainly: float = 1.0) -> tuple[bool, str]:
        def load(_: Path, threads: int, is_plain: bool) -> engines.Run:
            found = {name: each * plainly for name, each in plain.items()}
            wrong = {name: each * factor for name, each in exact.items()}
            return lambda _: found if is_plain else wrong

        engine = engines.Engine("openvino", "OpenVINO", "openvino", "", load)
        check = second_engine.check(path, engine, given, usual_db=100.0)
        return check.passed, check.detail

    passed, detail = told(1.0)
    assert passed and "its integer ones add convolutions before these are rounded" in detail
    assert not told(1.05)[0], "integer kernels that give neither the file's result nor that"
    assert not told(1.0, plainly=1.05)[0], "plain kernels that give another"


def test_flips_at_edges_are_no_fault_where_each_part_is_right(
    made: tuple[Result, Tensor], residual: tuple[Path, list[Arrays]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime that rounds halves up, on inputs that all lie in the middle of two levels."""
    result, x = made
    monkeypatch.setattr(second_engine, "SQNR_DB", 60.0)
    grid = result.checkpoint.activations["x"]
    halves = ((x / grid.scale).floor().clamp(0, 254) + 0.5) * grid.scale
    path, given, net = residual[0], [{"input": halves.numpy()}], deployed.network(result.checkpoint)
    assert isinstance(net, fx.GraphModule)

    def told(own_net: fx.GraphModule | None, *, plainly: float = 1.0, usually: float = 1.0) -> tuple[bool, str]:
        def load(file: Path, threads: int, plain: bool) -> engines.Run:
            session = runtime.session(file, optimise=False)
            names = [each.name for each in session.get_outputs()]
            last = runtime.read(path).graph.output[0].name

            def run(arrays: Arrays) -> dict[str, engines.Array]:
                found = session.run(names, {"input": arrays["input"] + 1e-5})
                factors = [(plainly if plain else usually) if name == last else 1.0 for name in names]
                return {name: each * np.float32(by) for name, each, by in zip(names, found, factors, strict=True)}

            return run

        engine = engines.Engine("openvino", "OpenVINO", "openvino", "", load)
        check = second_engine.check(path, engine, given, usual_db=100.0, net=own_net)
        return check.passed, check.detail

    passed, detail = told(net)
    assert passed and detail.endswith("each part is right, and single codes at the edge of two add up"), detail
    assert not told(None)[0], "nobody can tell what the parts should be"
    assert not told(net, plainly=1.05, usually=1.05)[0], "a part is wrong"
    assert not told(net, usually=1.05)[0], "the parts are right, and what is used is not what they make"
