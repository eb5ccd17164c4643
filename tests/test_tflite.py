"""TensorFlow Lite: the file computes in LiteRT what the ONNX file of the same codes computes in ONNX Runtime."""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import r2cli
from conftest import R2
from r2cli import data
from r2cli.calibration.result import Result
from r2cli.deploy import engines, onnx_export, runtime, second_engine
from r2cli.errors import InputError

pytest.importorskip("ai_edge_litert", reason="pip install '.[tflite]'")


class Net(nn.Module):
    """A first convolution to 8 channels, a `body` on images (n, 8, 8, 8), and a linear layer of ten classes."""

    def __init__(self, body: nn.Module | Callable[[Tensor], Tensor], features: int) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(1, 8, 3, stride=2, padding=1), body, nn.Linear(features, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(F.relu(self.stem(x)))
        return self.head(torch.flatten(x, 1))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gate = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        return F.relu(x + self.layer(x) * scale)


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=1, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), F.hardswish(self.other(x))], 1)


def _halves(x: Tensor) -> Tensor:
    left, right = x.chunk(2, 1)
    return torch.cat([F.pad(left[:, :, 1:, ::2], (1, 3, 1, 0)), F.interpolate(right[:, :, :4, :], (8, 8))], 1)


def _shuffled(x: Tensor) -> Tensor:
    return x.reshape(-1, 2, 4, 8, 8).transpose(1, 2).reshape(-1, 8, 8, 8).permute(0, 2, 1, 3)


class Attention(nn.Module):
    """Tokens of an image: a norm, attention, a sum, and a GELU between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.wide, self.narrow = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).reshape(-1, 64, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 64, 8))
        return x + self.narrow(F.gelu(self.wide(x)))


class _Deep(nn.Module):
    """A convolution of three axes, which TensorFlow Lite has in float alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.unsqueeze(2))


class Line(nn.Module):
    """A row of 64 values in eight channels."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.pool = nn.Conv1d(8, 8, 3, padding=1, groups=2), nn.MaxPool1d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(F.relu(self.one(x.flatten(2))))


def _scaled(x: Tensor) -> Tensor:
    return torch.sigmoid(x + 0.0) * x


BODIES: dict[str, tuple[Callable[[], nn.Module | Callable[[Tensor], Tensor]], int]] = {
    "number": (lambda: _scaled, 512),
    "attention": (Attention, 512),
    "line": (Line, 256),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(8, 4, 3, 2, 1, output_padding=1), nn.ReLU()), 1024),
    "pixel shuffle": (lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.PixelShuffle(2)), 512),
    "softmax": (lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.Softmax(1), nn.GroupNorm(2, 8)), 512),
    "bounds": (lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.Hardtanh(-0.2, 0.3), nn.LeakyReLU(0.1)), 512),
    "sizes": (lambda: nn.Sequential(nn.Upsample(12), nn.AdaptiveAvgPool2d(5), nn.Upsample(6, mode="bilinear")), 288),
    "residual": (Residual, 512),
    "joined": (Joined, 512),
    "vector": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(512, 16), nn.Hardswish()), 16),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.ReLU6(), nn.Conv2d(8, 16, 1)), 256),
    "multiplied": (lambda: nn.Conv2d(8, 16, 5, padding=4, dilation=2, groups=8), 1024),
    "max pool": (lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.MaxPool2d(3, 2, 1)), 128),
    "rounded up": (lambda: nn.Sequential(nn.Conv2d(8, 8, 2), nn.MaxPool2d(3, 2, ceil_mode=True)), 72),
    "mean pool": (lambda: nn.AvgPool2d(2), 128),
    "shuffled": (lambda: _shuffled, 512),
    "unshuffled": (lambda: nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(32, 8, 1)), 128),
    "celu": (lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.CELU(0.5), nn.Conv2d(8, 8, 1)), 512),
    "moved": (lambda: _halves, 512),
}


@pytest.mark.parametrize("name", BODIES)
def test_litert_gives_what_onnx_runtime_gives(name: str, tmp_path: Path) -> None:
    from r2cli.deploy import tflite_export, tflite_run

    torch.manual_seed(0)
    body, features = BODIES[name]
    made = r2cli.quantize(
        Net(body(), features).eval(),
        data.load("digits"),
        r2cli.PtqConfig(weight_bits=4, target="tflite", calibration=32),
    )
    (tmp_path / "model.onnx").write_bytes(onnx_export.to_bytes(made.checkpoint))
    (tmp_path / "model.tflite").write_bytes(tflite_export.to_bytes((tmp_path / "model.onnx").read_bytes()))
    images = torch.randn(16, 1, 16, 16)
    expected = runtime.runner(tmp_path / "model.onnx")(images)
    found = tflite_run.runner(tmp_path / "model.tflite")(images)
    step = float(made.checkpoint.activations["head"].scale)  # of the result's codes: LiteRT rounds by a shift
    assert float((found - expected).abs().max()) <= 2.01 * step


def test_a_batch_of_two_runs_any_number_of_images(tmp_path: Path) -> None:
    from r2cli.deploy import tflite_run

    torch.manual_seed(0)
    config = r2cli.PtqConfig(target="tflite", calibration=8)
    made = r2cli.quantize(Net(Joined(), 512).eval(), data.load("digits"), config)
    found, images = [], torch.randn(3, 1, 16, 16)
    for batch in ("1", "2"):
        r2cli.export(made, tmp_path / "model.tflite", r2cli.ExportForm(batch=batch))
        found.append(tflite_run.runner(tmp_path / "model.tflite")(images))
    assert torch.equal(*found) and len(found[0]) == 3
    with pytest.raises(InputError, match="tflite has a fixed batch"):
        r2cli.export(made, form=r2cli.ExportForm(batch="dynamic"))


@pytest.mark.parametrize("work", [r2cli.quantize, r2cli.finetune, r2cli.palettize])
def test_what_has_no_form_is_named_before_any_work(work: Callable[..., object]) -> None:
    configs = {"quantize": r2cli.PtqConfig, "finetune": r2cli.QatConfig, "palettize": r2cli.PalettizeConfig}
    config = configs[work.__name__](target="tflite")
    with pytest.raises(
        InputError, match=r"'body_layer' \(Conv\) cannot be written .*it reads 3 axes.*another --target"
    ):
        work(Net(_Deep(), 512).eval(), data.load("digits"), config)


def test_litert_is_an_engine_of_its_own_targets_onnx_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = r2cli.quantize(
        Net(nn.MaxPool2d(2), 128).eval(), data.load("digits"), r2cli.PtqConfig(target="tflite", calibration=8)
    )
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_export.to_bytes(made.checkpoint))
    given = [{"input": image.numpy()[None]} for image in torch.randn(8, 1, 16, 16)]
    assert second_engine.check(path, engines.named("tflite"), given).passed
    file = onnx.load(path)
    file.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.save(file, path)
    refused = second_engine.check(path, engines.named("tflite"), given)
    assert not refused.passed and "the size of 'input' is not fixed" in refused.detail


def test_another_target_s_checkpoint_has_no_codes_of_its_result() -> None:
    torch.manual_seed(0)
    made = r2cli.quantize(Net(nn.MaxPool2d(2), 128).eval(), data.load("digits"), r2cli.PtqConfig(calibration=8))
    with pytest.raises(InputError, match="result has no codes, .*again with --target tflite"):
        r2cli.export(made, form=r2cli.ExportForm(target="tflite"))


def test_a_file_is_proved_against_its_checkpoint_and_a_changed_one_is_caught(tmp_path: Path) -> None:
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    torch.manual_seed(0)
    images = data.load("digits:64")
    made = r2cli.quantize(Net(Joined(), 512).eval(), images, r2cli.PtqConfig(target="tflite", calibration=8))
    path = tmp_path / "model.tflite"
    r2cli.export(made, path, r2cli.ExportForm(batch="2"))
    config = r2cli.VerifyConfig(runtime=["tflite"])
    proof = r2cli.verify(path, made, images, config)
    assert proof.passed and {"same tensors", "tflite"} <= {check.name for check in proof.checks}
    with pytest.raises(InputError, match=r"model.tflite is proved against its checkpoint: name that with --against"):
        r2cli.verify(path)
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes())
    tensor = next(each for each in model.subgraphs[0].tensors if each.name == b"stem.weight.codes")
    model.buffers[tensor.buffer].data = model.buffers[tensor.buffer].data ^ 1
    builder = flatbuffers.Builder(1 << 10)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    wrong = [check.detail for check in r2cli.verify(path, made, images, config).checks if not check.passed]
    assert wrong and wrong[0] == "'stem.weight.codes' is not as the checkpoint has it"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "config"),
    [
        (r2cli.finetune, r2cli.QatConfig(weight_bits=2, target="ethos-u", epochs=1, images=64, calibration=32)),
        (r2cli.palettize, r2cli.PalettizeConfig(bits=2, method="kmeans", target="tflite", calibration=32)),
    ],
    ids=["qat", "palettize"],
)
def test_other_methods_are_written_too(work: Callable[..., Result], config: object, tmp_path: Path) -> None:
    from r2cli.deploy import tflite_run

    torch.manual_seed(0)
    made = work(Net(Residual(), 512).eval(), data.load("digits"), config)
    (tmp_path / "model.onnx").write_bytes(onnx_export.to_bytes(made.checkpoint))
    r2cli.export(made, tmp_path / "model.tflite")
    given = [{"input": image.numpy()[None]} for image in torch.randn(8, 1, 16, 16)]
    files = tmp_path / "model.tflite", tmp_path / "model.onnx"
    assert tflite_run.beside_onnx(*files, given, usual_db=40.0).passed


@pytest.mark.slow
def test_the_command_writes_and_proves_it_and_vela_tells_of_few_bits(r2: R2, trained: Path, tmp_path: Path) -> None:
    flash = {}
    for bits in (8, 2):
        output = tmp_path / f"{bits}.safetensors"
        ran = r2("ptq", trained, "--target", "ethos-u", "--weight-bits", bits, "-o", output, "--json")
        report = json.loads(ran.out)
        assert ran.code == 0 and "tflite" in [each["name"] for each in report["checks"]], ran.err
        assert {path.name for path in tmp_path.glob(f"{bits}.*")} == {f"{bits}.{e}" for e in ENDINGS}
        flash[bits] = report["vela"] and report["vela"]["flash_bytes"]
    if find_spec("ethosu") is not None:
        assert flash[2] < 0.5 * flash[8]
    again = json.loads(r2("evaluate", tmp_path / "2.tflite", "--json").out)
    assert again["engine"] == "LiteRT" and abs(again["top1"] - report["top1"]) < 1
    ran = r2("export", tmp_path / "2.safetensors", "--target", "tflite", "-o", tmp_path / "again.tflite")
    assert ran.code == 0, ran.err
    sizes = [(tmp_path / f"{name}.tflite").stat().st_size for name in ("again", "2")]
    assert abs(sizes[0] - sizes[1]) <= 16  # the name of the target in it, and what fills it up
    refused = r2("export", tmp_path / "2.safetensors", "-o", tmp_path / "again.onnx")
    assert refused.code == 2 and "give --target ethos-u, or --target onnxruntime" in refused.err


def test_without_vela_there_is_no_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from r2cli.deploy import vela

    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    assert vela.report(tmp_path / "model.tflite") is None


ENDINGS = ("safetensors", "tflite", "manifest.json")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    from r2cli.deploy import tflite_run

    path = tmp_path / "model.tflite"
    path.write_bytes(b"TFL3" * 10)
    with pytest.raises(InputError, match=r"model.tflite does not load in LiteRT"):
        tflite_run.runner(path)
    with pytest.raises(InputError, match=r"model.tflite: it is damaged, or not of TensorFlow Lite"):
        tflite_run.recorded(path)
