"""Commands as a user runs them: exit codes, JSON, files; and everything that can be wrong with the input."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import R2, Forget
from r2cli.cli import deliver
from r2cli.config.groups import CompressionGates
from r2cli.data import metrics
from r2cli.deploy import onnx_export
from r2cli.errors import CheckFailed
from r2cli.storage import checkpoint


@pytest.fixture
def model(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A float checkpoint `model.safetensors` in the working directory."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copy(trained, tmp_path / "model.safetensors"))


# --- the road ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_road(r2: R2, model: Path) -> None:
    quantized = r2("ptq", "--weight-bits", "4", "--json")
    assert quantized.code == 0, quantized.err
    report = json.loads(quantized.out)
    assert report["passed"] and report["ticks"] == "10/10" and len(report["layers"]) == 10
    assert abs(report["top1"] - report["float_top1"]) < 10
    onnx = Path("model.w4a8-none.onnx")
    assert onnx.stat().st_size == report["bytes"]
    for source in (onnx, onnx.with_suffix(".safetensors")):
        evaluated = r2("evaluate", source, "--json")
        assert evaluated.code == 0, evaluated.err
        assert json.loads(evaluated.out)["top1"] == pytest.approx(report["top1"], abs=0.35)
    exported = r2("export", "model.w4a8-none.safetensors", "-o", "again.onnx", "--json")
    assert exported.code == 0 and Path("again.onnx").read_bytes() == onnx.read_bytes()
    history = checkpoint.load(Path("model.w4a8-none.safetensors")).history
    assert [entry["command"] for entry in history] == ["pretrain", "ptq"]
    assert "seconds" not in json.dumps(history)


@pytest.mark.slow
def test_people_get_a_table_ticks_and_the_next_command(r2: R2, model: Path) -> None:
    ran = r2("ptq", "--granularity", "unfolded")
    assert ran.code == 0
    assert ran.out.count("✓") == 10 and "next: r2 evaluate model.w8a8-none-unfolded.onnx" in ran.out
    assert "stages.2.0.conv1" in ran.out


def test_float_checkpoints_need_no_r2(model: Path) -> None:
    from r2cli import models

    network = models.build(models.spec("resnet8", classes=10, channels=1, size=8, width=None))
    network.load_state_dict(load_file(model))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(r2: R2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        options = ["--model", "resnet8", "--size", 8, "--epochs", 1, "--device", "cpu"]
        assert r2("pretrain", *options, "--seed", seed, "-o", f"{name}.safetensors").code == 0
    a, b, c = (Path(f"{name}.safetensors").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.slow
def test_an_image_folder_goes_the_whole_road(r2: R2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 40), ("val", 10)):
        for name, colour in (("dark", 40), ("light", 200)):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(count):
                noise = torch.randint(-30, 30, (12, 12, 3), generator=torch.Generator().manual_seed(index))
                pixels = (colour + noise).to(torch.uint8).numpy()
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{index}.png")
    options = ["--model", "resnet8", "--data", "imagefolder:data", "--epochs", 3, "--batch-size", 16]
    made = r2("pretrain", *options, "--json")
    assert made.code == 0, made.err
    assert json.loads(made.out)["top1"] > 80
    assert r2("ptq", "--json").code == 2, "the checkpoint does not keep the path of the data"
    quantized = r2("ptq", "--data", "imagefolder:data", "--calibration", 32, "--json")
    assert quantized.code == 0, quantized.err
    assert json.loads(quantized.out)["passed"]
    recorded = checkpoint.load(tmp_path / "model.safetensors")
    assert recorded.input.size == 12 and recorded.class_names == ("dark", "light") and recorded.model.stem == "small"


# --- a network that r2 has never seen ---------------------------------------------------------------------------------

OWN_NET = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.norm(self.conv(x)))

class Own(nn.Module):
    def __init__(self, width, num_classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(Block(width), nn.MaxPool2d(2), Block(width))
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))

def own(width=16, num_classes=10):
    return Own(width, num_classes)
"""


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget_modules: Forget) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "net.py"
    path.write_text(OWN_NET)
    forget_modules("net")
    return path


@pytest.mark.slow
def test_a_network_and_weights_from_elsewhere_go_the_whole_road(r2: R2, net: Path) -> None:
    options = ["--model", "net.py:own", "--model-arg", "width=24", "--size", 8]
    trained = r2("pretrain", *options, "--epochs", 6, "--lr", 0.2, "-o", "own.safetensors", "--json")
    assert trained.code == 0, trained.err
    top1 = json.loads(trained.out)["top1"]
    assert top1 > 80
    namespace: dict[str, Any] = {}
    exec(OWN_NET, namespace)
    network = namespace["own"](width=24)
    network.load_state_dict(load_file("own.safetensors"))  # back in the factory that made it, without r2
    wrapped = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"epoch": 6, "state_dict": wrapped}, "own.pth")

    foreign = [*options, "--weights", "own.pth", "--data", "digits"]
    evaluated = r2("evaluate", *foreign, "--json")
    assert evaluated.code == 0, evaluated.err
    assert json.loads(evaluated.out)["top1"] == pytest.approx(top1)
    quantized = r2("ptq", *foreign, "--weight-bits", 8, "--json")
    assert quantized.code == 0, quantized.err
    report = json.loads(quantized.out)
    assert report["passed"] and abs(report["top1"] - top1) < 2 and len(report["layers"]) == 4
    assert r2("evaluate", "own.w8a8-none.onnx", "--min-accuracy", top1 - 2).code == 0, "the file needs no code of ours"
    exported = r2("export", *foreign, "-o", "float.onnx", "--json")
    assert exported.code == 0 and json.loads(exported.out)["passed"], exported.err
    assert "net.py:own" in r2("evaluate", "own.w8a8-none.safetensors").err
    again = r2("evaluate", "own.w8a8-none.safetensors", "--model", "net.py:own", "--json")
    assert json.loads(again.out)["top1"] == pytest.approx(report["top1"], abs=0.35)


@pytest.mark.slow
def test_weights_from_elsewhere_are_where_training_starts(r2: R2, model: Path) -> None:
    options = ["--model", "resnet8", "--size", 8, "--epochs", 1, "--lr", 1e-6, "-o", "more.safetensors"]
    before = checkpoint.load(model).history[0]["metrics"]["top1"]
    tuned = r2("pretrain", *options, "--weights", model, "--json")
    assert tuned.code == 0, tuned.err
    assert json.loads(tuned.out)["top1"] == pytest.approx(before, abs=2)
    assert json.loads(r2("pretrain", *options, "--overwrite", "--json").out)["top1"] < 50


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--weights", "model.safetensors"], "--model"),
        (["--weights", "model.safetensors", "--model", "resnet8"], "--data"),
        (["--weights", "none.pth", "--model", "resnet8", "--data", "digits"], "none.pth does not exist"),
        (["--weights", "model.safetensors", "--model", "resnet20", "--data", "digits"], "'stages.0.1.conv1.weight'"),
        (["model.safetensors", "--weights", "net.pth", "--model", "resnet8"], "two networks"),
        (["--model", "resnet8"], "--model resnet8 needs weights: give --weights FILE, or --pretrained"),
        (["model.safetensors", "--model", "resnet8"], "--model belongs to --weights"),
        (["--model-arg", "a=1"], "--model-arg belongs to --weights"),
        (["--size", 8], "--size does not apply"),
        (["--mean", "0.5"], "--mean does not apply"),
    ],
)
@pytest.mark.parametrize("command", ["ptq", "export", "evaluate"])
def test_options_that_contradict_each_other_are_refused(
    command: str, options: list[object], told: str, r2: R2, model: Path
) -> None:
    before = sorted(Path().iterdir())
    ran = r2(command, *options)
    assert ran.code == 2 and told in ran.err, ran.err
    assert len(ran.err.strip().splitlines()) == 1 and sorted(Path().iterdir()) == before


@pytest.mark.parametrize("command", ["ptq", "export", "evaluate"])
def test_code_without_weights_asks_for_them(
    command: str, r2: R2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text("def factory(): ...")
    ran = r2(command, "--model", "net.py:factory", "--data", "digits")
    assert ran.code == 2 and "--model net.py:factory needs weights: give --weights FILE, or the checkpoint" in ran.err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--mean", "a,b"),
        ("--mean", "0.1,0.2"),
        ("--std", "0"),
        ("--std", "nan"),
        ("--model-arg", "width"),
        ("--stem", "x"),
    ],
)
def test_option_values_that_say_nothing_are_refused(option: str, value: str, r2: R2, tmp_path: Path) -> None:
    ran = r2("pretrain", option, value, "--model", "resnet18", "-o", tmp_path / "m.safetensors")
    assert ran.code == 2 and option in ran.err, ran.err


@pytest.mark.parametrize("command", ["pretrain", "ptq", "export", "evaluate"])
def test_a_dry_run_writes_nothing(command: str, r2: R2, model: Path) -> None:
    more = ["-o", "other.safetensors"] if command == "pretrain" else []
    before = sorted(Path().iterdir())
    ran = r2(command, *more, "--dry-run")
    assert ran.code == 0 and "would" in ran.out
    assert sorted(Path().iterdir()) == before


@pytest.mark.slow
def test_run_makes_tables_and_does_nothing_twice(r2: R2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.toml").write_text(
        """
        [matrix]
        reg = ["none", "linf"]
        [[step]]
        run = "pretrain"
        model = "resnet8"
        size = 8
        epochs = 1
        reg = "{reg}"
        output = "{reg}.safetensors"
        [[table]]
        run = "pretrain"
        rows = ["reg"]
        metrics = { "top-1" = "top1" }
        """
    )
    first = r2("run", "small.toml", "--json")
    assert first.code == 0, first.err
    made = Path("runs/small/none.safetensors")
    stamp = made.stat().st_mtime_ns
    second = r2("run", "small.toml", "--json")
    assert json.loads(second.out)["tables"] == json.loads(first.out)["tables"]
    assert made.stat().st_mtime_ns == stamp and "[1/2]" not in second.err
    assert "| linf |" in Path("runs/small/tables.md").read_text()


# --- gates ---------------------------------------------------------------------------------------------------------


def _checks(*failed: str) -> list[dict[str, Any]]:
    names = ("same codes", "parity")
    return [{"name": name, "passed": name not in failed, "detail": f"about {name}"} for name in names]


def test_what_fails_of_a_proof_is_named_before_any_gate() -> None:
    metric = metrics.report_of(metrics.TOP1, 95.0)
    report: dict[str, Any] = {"output": "m.onnx", "metric": metric, "float_value": 97.0, "bytes": 2000}
    report["checks"] = _checks()
    wrong, strict = {**report, "checks": _checks("parity")}, CompressionGates(max_bytes=10)
    deliver.judge(wrong, strict, None)
    with pytest.raises(CheckFailed, match=r"^m.onnx failed its proof: parity \(about parity\)$") as caught:
        deliver.require(wrong)
    assert caught.value.report == wrong and not wrong["gates"][0]["passed"]
    for bounds, told in ((strict, "--max-bytes 10"), (CompressionGates(max_drop=1), "--max-drop 1")):
        deliver.judge(report, bounds, None)
        with pytest.raises(CheckFailed, match=told):
            deliver.require(report)
    deliver.judge(report, CompressionGates(max_drop=3, max_bytes=2000, min_accuracy=95), None)
    deliver.require(report)


def test_a_proof_is_told_in_ticks_with_what_the_processor_adds() -> None:
    fine = deliver.told({"checks": _checks("parity"), "overflow_db": 31.0, "embeddings": None})
    assert [str(line).split()[0] for line in fine] == ["✓", "✗"] and "about same codes" in str(fine[0])
    kept = {"coded": 0, "float": 4096}
    *_, overflow, embeddings = deliver.told({"checks": _checks(), "overflow_db": 12.0, "embeddings": kept})
    assert "overflow (12 dB)" in str(overflow) and str(embeddings) == "embeddings: 4,096 weights stay float32"


@pytest.mark.slow
@pytest.mark.parametrize("gate", [("--min-accuracy", 100.1), ("--max-drop", -50), ("--max-bytes", 10)])
def test_a_gate_that_fails_exits_1_and_leaves_the_files(gate: tuple[str, float], r2: R2, model: Path) -> None:
    ran = r2("ptq", *gate, "--json")
    assert ran.code == 1 and gate[0] in ran.err
    assert Path("model.w8a8-none.onnx").exists() and Path("model.w8a8-none.safetensors").exists()


@pytest.mark.slow
def test_gates_that_hold_pass(r2: R2, model: Path) -> None:
    assert r2("ptq", "--min-accuracy", 80, "--max-drop", 3, "--max-bytes", 200_000).code == 0
    assert r2("evaluate", "--min-accuracy", 99.99).code == 1


@pytest.mark.slow
def test_a_proof_that_fails_exits_1_and_says_where(r2: R2, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = onnx_export.to_bytes

    def broken(*given: Any) -> bytes:
        import onnx

        file = onnx.load_from_string(honest(*given))
        codes = next(i for i in file.graph.initializer if i.name == "conv.weight.codes")
        codes.raw_data = bytes(len(codes.raw_data))
        return file.SerializeToString()

    monkeypatch.setattr(onnx_export, "to_bytes", broken)
    ran = r2("ptq")
    assert ran.code == 1 and "same codes" in ran.err and "conv.weight" in ran.err


# --- how much is measured -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_accuracy_is_measured_on_as_many_images_as_are_asked_for(r2: R2, model: Path) -> None:
    exported = json.loads(r2("export", "--eval-images", 50, "--json").out)
    assert exported["samples"] == 50 and exported["top1"] % 2 == 0
    measured = json.loads(r2("evaluate", "model.onnx", "--eval-images", 50, "--json").out)
    assert measured["images"] == 50 and measured["top1"] == exported["top1"]


@pytest.mark.slow
def test_a_file_is_proved_where_accuracy_is_not_measured(r2: R2, model: Path) -> None:
    ran = r2("ptq", "--no-eval", "--json")
    report = json.loads(ran.out)
    assert ran.code == 0 and report["passed"] and report["samples"] == 64
    assert report["top1"] is report["torch_top1"] is report["float_top1"] is None
    assert "accuracy not measured" in r2("export", "--no-eval").out


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("qat", "--no-eval"), "--eval-images 64"),
        (("palettize", "--no-eval"), "--eval-images 64"),
        (("ptq", "--no-eval", "--max-drop", 1), "leave out --no-eval"),
        (("ptq", "--no-eval", "--eval-images", 9), "contradict"),
        (("export", "--eval-images", 0), "--eval-images"),
    ],
)
def test_what_cannot_be_without_measuring_is_refused(command: tuple[str, ...], says: str, r2: R2, model: Path) -> None:
    ran = r2(*command)
    assert ran.code == 2 and says in ran.err and not list(Path().glob("*.onnx"))


# --- bad input -----------------------------------------------------------------------------------------------------


def _one_sentence(text: str) -> bool:
    return text.startswith("r2: ") and "Traceback" not in text and text.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["ptq", "missing.safetensors"], ["missing.safetensors"]),
        (["ptq", "."], ["directory"]),
        (["ptq", "--weight-bits", 9], ["--weight-bits 9", "1 to 8"]),
        (["ptq", "--weight-bits", 0], ["--weight-bits 0"]),
        (["ptq", "--act-bits", 3], ["--act-bits 3", "8 to 4"]),
        (["ptq", "--act-range", "mean"], ["mean", "minmax"]),
        (["ptq", "--weight-range", "percentile:40"], ["percentile:40", "50"]),
        (["ptq", "--weight-range", "entropy"], ["entropy", "minmax"]),
        (["ptq", "--asymmetric", "--weight-bits", 1], ["one bit", "--symmetric"]),
        (["ptq", "--asymmetric", "--keep", "conv=1"], ["one bit", "--symmetric"]),
        (["ptq", "--weight-bits", 4, "--target-bits", 3], ["--weight-bits 4 and --target-bits 3", "one of them"]),
        (["ptq", "--target-bits", 9], ["--target-bits 9", "1 to 8"]),
        (["ptq", "--target-bytes", 100], ["100 bytes", "at least"]),
        (["ptq", "--target-bits", 3, "--sensitivity", "trace"], ["trace", "hessian"]),
        (["ptq", "--calibration", 0, "--act-range", "mse"], ["--act-range mse", "--calibration"]),
        (["ptq", "--act-bits", "none", "--act-range", "mse"], ["--act-range mse", "--act-bits none"]),
        (["palettize", "--lut-bits", 32, "--act-range", "mse"], ["--act-range mse", "--act-bits none"]),
        (["ptq", "--calibration", 0, "--act-bits", "none", "--target-bits", 3], ["images", "--sensitivity sqnr"]),
        (["ptq", "--calibration", 5000, "--act-bits", "none"], ["--calibration 5000", "1200"]),
        (["ptq", "--granularity", "chanel"], ["chanel", "'channel'"]),
        (["ptq", "--method", "nome"], ["nome", "'none'"]),
        (["ptq", "--keep", "classifer=8"], ["classifer", "'classifier'"]),
        (["ptq", "--keep", "classifier"], ["--keep classifier", "PATTERN=BITS"]),
        (["ptq", "--keep", "classifier=9"], ["classifier=9"]),
        (["ptq", "--calibration", 5000], ["--calibration 5000", "1200"]),
        (["ptq", "--data", "digit"], ["digit", "'digits'"]),
        (["ptq", "--device", "cuda:99"], ["cuda:99", "--device cpu"]),
        (["ptq", "--device", "gpu"], ["gpu"]),
        (["ptq", "--weight-bit", 4], ["--weight-bit"]),
        (["pretain"], ["pretain"]),
        (["pretrain"], ["model.safetensors", "--overwrite"]),
        (["pretrain", "-o", "x.safetensors", "--reg", "margn"], ["margn", "'margin'"]),
        (["pretrain", "-o", "x.safetensors", "--reg-form", "papr"], ["papr", "'paper'"]),
        (["pretrain", "-o", "x.safetensors", "--model", "resnet19"], ["resnet19", "'resnet18'"]),
        (["pretrain", "-o", "x.safetensors", "--model", "resnet8", "--width", 0.5], ["--width", "resnet8"]),
        (["pretrain", "-o", "x.safetensors", "--width", 0], ["--width 0"]),
        (["pretrain", "-o", "x.safetensors", "--size", 2], ["--size 2"]),
        (["pretrain", "-o", "x.safetensors", "--data", "imagefolder:nowhere"], ["nowhere"]),
        (["pretrain", "-o", "x.safetensors", "--data", "imagefolder"], ["imagefolder:DIR"]),
        (["pretrain", "-o", "x.safetensors", "--epochs", "many"], ["--epochs"]),
        (["evaluate", "missing.onnx"], ["missing.onnx"]),
        (["export", "missing.safetensors"], ["missing.safetensors"]),
        (["run", "missing.toml"], ["missing.toml"]),
        (["pretrain", "-o", "x.onnx"], ["x.onnx", ".safetensors"]),
        (["pretrain", "-o", "."], ["directory"]),
        (["pretrain", "-o", "x.safetensors", "--batch-size", 1], ["--batch-size"]),
        (["pretrain", "-o", "x.safetensors", "--reg", "linf", "--reg-weight", "nan"], ["--reg-weight"]),
        (["ptq", "-o", "model.safetensors", "--overwrite"], ["model.safetensors", "source itself"]),
        *(
            ([name, "net.onnx", "-o", "net.safetensors", "--overwrite"], ["net.onnx, which", "the source itself"])
            for name in ("ptq", "qat", "palettize")
        ),
        (["export", "-o", "x.safetensors"], ["x.safetensors", ".onnx"]),
        (["ptq", "--keep", "con=²"], ["con=", "²", "known are 8"]),
        (["ptq", "--keep", "con=tensr"], ["con=", "'tensor'"]),
        (["ptq", "--keep", "*=float"], ["every layer"]),
        (["ptq", "--keep", "conv=A2"], ["--act-bits 2"]),
        (["ptq", "--keep", "conv=A8", "--act-bits", "none"], ["A8", "--act-bits none"]),
        (["ptq", "--act-bits", 16, "--opset", 17], ["16 bits", "--opset 21"]),
        (["ptq", "--act-bits", 16, "--target", "tensorrt"], ["tensorrt", "16 bits", "--target onnxruntime"]),
        (["ptq", "--keep", "conv=A16", "--target", "st"], ["st", "16 bits"]),
        (["ptq", "--keep", "conv=float", "--target", "tflite"], ["tflite", "float layers"]),
        (["qat", "--keep", "conv=tensor"], ["tensor", "r2 ptq"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_bad_arguments_get_one_sentence(arguments: list[object], names: list[str], r2: R2, model: Path) -> None:
    before = {path: path.read_bytes() for path in Path().iterdir()}
    ran = r2(*arguments)
    assert ran.code == 2
    last = ran.err.splitlines()[-1] + "\n"
    assert _one_sentence(last), ran.err
    assert all(name in last for name in names), last
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


def test_a_data_set_of_other_classes_is_refused(r2: R2, model: Path) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (Path("pets") / split / name).mkdir(parents=True)
            Image.new("L", (8, 8), 100).save(Path("pets") / split / name / "1.png")
    ran = r2("evaluate", "--data", "imagefolder:pets")
    assert ran.code == 2 and "'cat'" in ran.err and "'0'" in ran.err and "model.safetensors" in ran.err


def test_a_file_s_name_is_no_markup(r2: R2, model: Path) -> None:
    shutil.copy(model, "v[bold]x.safetensors")
    ran = r2("evaluate", "v[bold]x.safetensors")
    assert ran.code == 0 and "v[bold]x.safetensors: top-1" in ran.out


@pytest.mark.slow
def test_errors_are_json_too(r2: R2, model: Path) -> None:
    ran = r2("ptq", "missing.safetensors", "--json")
    assert json.loads(ran.out) == {"error": ran.err.removeprefix("r2: ").strip(), "exit_code": 2}


@pytest.mark.slow
def test_a_failed_gate_is_in_the_one_object_of_the_report(r2: R2, model: Path) -> None:
    gate = ("--json", "--max-bytes", 10)
    for ran in (r2("evaluate", *gate), r2("ptq", *gate), r2("run", _recipe_with_a_gate(), "--json")):
        told = json.loads(ran.out)
        assert ran.code == 1 == told["exit_code"] and "--max-bytes 10" in told["error"] and told["error"] in ran.err
        assert told["command"] in ("evaluate", "ptq", "run") and ("bytes" in told or told["results"][0]["failed"])


@pytest.mark.slow
def test_what_a_network_s_own_code_prints_is_no_result(r2: R2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("noisy.py").write_text(
        "import torch\n\n\ndef net(num_classes: int) -> torch.nn.Module:\n    print('hello')\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(1, num_classes, 3), torch.nn.AdaptiveAvgPool2d(1), "
        "torch.nn.Flatten())\n"
    )
    Path("noisy.toml").write_text(
        '[[step]]\nrun = "pretrain"\nmodel = "noisy.py:net"\ndata = "digits:64"\nepochs = 1\n'
        'output = "own.safetensors"\n\n[[step]]\nrun = "evaluate"\nsource = "own.safetensors"\n'
        'model = "noisy.py:net"\nmin-accuracy = 100\n'
    )
    ran = r2("run", "noisy.toml", "--json")
    told = json.loads(ran.out)
    assert ran.code == 1 and "below --min-accuracy 100" in told["error"] and len(told["results"]) == 2


def _recipe_with_a_gate() -> Path:
    recipe = Path("gate.toml")
    recipe.write_text('[[step]]\nrun = "evaluate"\nsource = "../../model.safetensors"\nmax-bytes = 10\n')
    return recipe


def test_damaged_checkpoints_are_named(r2: R2, model: Path) -> None:
    Path("cut.safetensors").write_bytes(model.read_bytes()[:2000])
    Path("noise.safetensors").write_bytes(os.urandom(5000))
    save_file({"a": torch.zeros(3)}, "foreign.safetensors")
    for name in ("cut", "noise", "foreign"):
        ran = r2("ptq", f"{name}.safetensors")
        assert ran.code == 2 and f"{name}.safetensors" in ran.err and _one_sentence(ran.err)


def test_nan_weights_are_named_with_file_and_tensor(r2: R2, model: Path) -> None:
    made = checkpoint.load(model)
    made.floats["stages.1.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    checkpoint.save(made, Path("bad.safetensors"))
    ran = r2("ptq", "bad.safetensors")
    assert ran.code == 2 and "bad.safetensors" in ran.err and "'stages.1.0.conv1.weight'" in ran.err


def test_another_architectures_tensors_are_named(r2: R2, model: Path) -> None:
    from dataclasses import replace

    made = checkpoint.load(model)
    checkpoint.save(replace(made, model=replace(made.model, name="resnet20")), Path("other.safetensors"))
    ran = r2("ptq", "other.safetensors")
    assert ran.code == 2 and "stages.0.1.conv1.weight" in ran.err and "other.safetensors" in ran.err


@pytest.mark.slow
def test_existing_outputs_are_never_overwritten_unasked(r2: R2, model: Path) -> None:
    Path("model.w8a8-none.onnx").write_text("mine")
    ran = r2("ptq")
    assert ran.code == 2 and "model.w8a8-none.onnx" in ran.err and "--overwrite" in ran.err
    assert Path("model.w8a8-none.onnx").read_text() == "mine"
    assert not Path("model.w8a8-none.safetensors").exists()
    assert r2("ptq", "--overwrite").code == 0
    assert Path("model.w8a8-none.onnx").stat().st_size > 50_000


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_nothing_is_lost(model: Path) -> None:
    before = model.read_bytes()
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, {resource.RLIM_INFINITY}));"
        "import sys; sys.argv = ['r2', 'ptq', '--overwrite']; from r2cli.cli.main import main; main()"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 3 and "model.w8a8-none.safetensors could not be written" in ran.stderr
    assert model.read_bytes() == before and [path.name for path in Path().iterdir()] == ["model.safetensors"]


@pytest.mark.slow
def test_ctrl_c_exits_130_and_leaves_a_state_to_resume(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "r2cli", "pretrain", "--model", "resnet8", "--size", "8", "--epochs", "500"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A shell starts what runs in its background with the signal ignored, and so would we.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    state = tmp_path / "model.resume.safetensors"
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == [state.name]


@pytest.mark.slow
def test_an_internal_error_exits_3_without_a_traceback(r2: R2, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> bytes:
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr(onnx_export, "to_bytes", broken)
    ran = r2("ptq")
    assert ran.code == 3 and "ZeroDivisionError" in ran.err and "R2_TRACEBACK" in ran.err and "Traceback" not in ran.err
    monkeypatch.setenv("R2_TRACEBACK", "1")
    ran = r2("ptq", "--overwrite")
    assert ran.code == 3 and "Traceback" in ran.err and ran.err.splitlines()[-1].startswith("r2: internal error")
    assert r2("ptq", "--nosuch").code == 2


def test_help_shows_the_commands(r2: R2) -> None:
    ran = r2("--help")
    assert ran.code == 0 and all(name in ran.out for name in ("pretrain", "ptq", "export", "evaluate", "run"))
    assert r2("--version").out.startswith("r2 ")
