"""Data, metrics and gates of the user's own on the command line, by small files in the test's folder."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from conftest import R2
from r2cli import models
from r2cli.storage import own_code

TASK = '''
import torch
from torch import nn

from r2cli.storage import own_code
from torch.utils.data import TensorDataset

class Net(nn.Module):
    """Its target is the first output, but for the last sample."""
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
    def forward(self, x):
        return self.head(torch.relu(self.body(x)))

class Pair(Net):
    def forward(self, image, vector):
        x = super().forward(vector)
        return {"sum": x + image.mean((1, 2, 3))[:, None], "vector": x}

def x(count):
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(0))

def data(count=32, target=True):
    net = Net()
    net.load_state_dict(torch.load(__file__.replace("task.py", "net.pth")))
    with torch.no_grad():
        y = net(x(count))
    return TensorDataset(x(count), y + 0.01) if target else [x(count)]

def pair():
    return [{"image": x(24 * 4).reshape(24, 1, 4, 4), "vector": x(24)}]

def wrong():
    return "digits"

def largest(outputs, targets):
    return {"largest": outputs.max(), "least": outputs.min()}

def off(outputs, targets, by):
    return float((outputs - targets).abs().mean()) + by

def raises(outputs, targets):
    return outputs["sum"]
'''


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.manual_seed(0)
    net = nn.Module()
    net.body, net.head = nn.Linear(4, 8), nn.Linear(8, 1)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    (tmp_path / "task.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


NET = ("--weights", "net.pth", "--model", "task.py:Net")
FULL = (*NET, "--data", "task.py:data")


def test_a_metric_is_measured_on_torch_and_on_the_file_alike(r2: R2, task: Path) -> None:
    ran = r2("ptq", *FULL, "--data-arg", "count=40", "--metric", "mae", "-o", "q.safetensors", "--json")
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    metric = report["metric"]
    assert (metric["label"], metric["higher"], report["top1"], report["float_top1"]) == ("MAE", False, None, None)
    assert metric["value"] == pytest.approx(metric["torch"], rel=1e-3) and report["float_value"] == pytest.approx(0.01)
    assert metric["value"] == pytest.approx(0.01, abs=0.01) and report["samples"] == 8
    measured = r2("evaluate", "q.onnx", "--data", "task.py:data", "--data-arg", "count=40", "--metric", "mae", "--json")
    again = r2(
        "ptq", *FULL, "--data-arg", "count=40", "--metric", "task.py:off", "--metric-arg", "by=1", "--metric-lower"
    )
    assert (
        "next: r2 evaluate net.w8a8-none.onnx --data task.py:data --data-arg count=40 --metric task.py:off "
        in again.out
    )
    assert "--metric-arg by=1 --metric-lower" in again.out
    assert json.loads(measured.out)["metric"]["value"] == pytest.approx(metric["value"], rel=1e-4)
    told = r2("evaluate", "q.safetensors", "--model", "task.py:Net", "--data", "task.py:data", "--metric", "mse")
    assert told.code == 0 and "q.safetensors: MSE 0.000" in told.out and "of 6 images" in told.out
    given = ("--model", "task.py:Net", "--data", "task.py:data", "-o", "again.onnx")
    assert r2("export", "q.safetensors", *given).code == 0
    assert (task / "again.onnx").read_bytes() == (task / "q.onnx").read_bytes()


def test_gates_follow_the_metric(r2: R2, task: Path) -> None:
    base = ("ptq", *FULL, "--metric", "mae", "--overwrite", "-o", "q.safetensors")
    assert r2(*base, "--min-metric", 0.1, "--max-drop", 0.05, "--min-sqnr", 20).code == 0
    for gate, why in {
        ("--min-metric", "0.001"): "MAE 0.0.* is above --min-metric 0.001",
        ("--max-drop", "-1"): "the drop of .* points is above --max-drop -1",
        ("--min-sqnr", "90"): "dB from the float network's are below --min-sqnr 90",
    }.items():
        ran = r2(*base, *gate)
        assert ran.code == 1 and re.search(why, ran.err), ran.err
    assert (
        "--min-accuracy is the least top-1 and what is measured is MAE: give --min-metric"
        in r2(*base, "--min-accuracy", 1).err
    )


def test_without_a_target_the_outputs_are_compared_with_the_float_network(r2: R2, task: Path) -> None:
    ran = r2("ptq", *FULL, "--data-arg", "target=False", "-o", "q.safetensors")
    assert ran.code == 0 and "dB from the float network" in ran.out, ran.err
    assert "need data with labels or targets" in r2("ptq", *FULL, "--data-arg", "target=False", "--max-drop", 1).err
    ran = r2("ptq", *NET, "--input-shape", "x=4", "--act-bits", "none", "-o", "w.safetensors")
    assert ran.code == 0, ran.err
    assert "--input-shape x=4x does" not in ran.err and r2("ptq", *NET, "--input-shape", "x=4x").code == 2


def test_several_outputs_are_told_one_by_one(r2: R2, task: Path) -> None:
    given = ("--weights", "net.pth", "--model", "task.py:Pair", "--data", "task.py:pair")
    ran = r2("ptq", *given, "-o", "p.safetensors", "--json")
    assert ran.code == 0, ran.err
    outputs = json.loads(ran.out)["outputs"]
    assert list(outputs) == ["sum", "vector_output"] and min(one["float_sqnr_db"] for one in outputs.values()) > 20


def test_arrays_by_name_calibrate_and_are_measured(r2: R2, task: Path) -> None:
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(3))
    folder = task / "arrays"
    folder.mkdir()
    np.savez(folder / "train.npz", x=x.numpy())
    np.savez(folder / "test.npz", x=x[:6].numpy().astype(np.float64))
    ran = r2("ptq", *NET, "--data", "npz:arrays", "-o", "q.safetensors", "--json")
    assert ran.code == 0 and json.loads(ran.out)["samples"] == 6, ran.err
    np.savez(task / "own.npz", x=x.numpy(), target=np.zeros((20, 1)))
    assert r2("ptq", *NET, "--data", "npz:own.npz", "--metric", "mae", "-o", "r.safetensors").code == 0
    unread = r2("ptq", *NET, "--data", "npz:own.npz", "-o", "u.safetensors")
    assert unread.code == 0 and "npz:own.npz holds targets that nothing measures: give --metric" in unread.err
    training = ("pretrain", *NET[2:], "--data", "npz:own.npz", "--loss", "mse", "--epochs", 1)
    assert "holds targets that nothing measures" in r2(*training, "-o", "v.safetensors").err
    other = ("--calibration-data", "npz:own.npz", "--calibration", 16)
    assert r2("ptq", *FULL, *other, "-o", "s.safetensors").code == 0
    assert "--calibration 17 is more" in r2("ptq", *FULL, *other[:2], "--calibration", 17, "-o", "t.safetensors").err


def test_arrays_of_other_names_are_told_or_refused(r2: R2, task: Path) -> None:
    x = np.zeros((20, 4), np.float32)
    np.savez(task / "own.npz", x=x)
    np.savez(task / "other.npz", mfcc=x)
    np.savez(task / "labels.npz", x=x, labels=np.zeros(20, np.int64))
    assert r2("export", *NET, "--input-shape", "x=4", "-o", "net.onnx").code == 0
    assert r2("ptq", *NET, "--data", "npz:own.npz", "-o", "q.safetensors").code == 0
    for command in (["ptq", "net.onnx", "--overwrite"], ["evaluate", "q.onnx"]):
        told = r2(*command, "--data", "npz:other.npz")
        assert f"npz:other.npz holds 'mfcc', which is given to 'x' of {command[1]}" in told.err, told.err
        assert "is given to" not in r2(*command, "--data", "npz:own.npz").err
        refused = r2(*command, "--data", "npz:labels.npz")
        assert refused.code == 2 and all(name in refused.err for name in ("labels int64", f"{command[1]} takes"))
    refused = r2("ptq", *NET, "--data", "npz:labels.npz", "-o", "r.safetensors")
    assert refused.code == 2 and "hold x, labels and task.py:Net takes x" in refused.err
    assert "call the target 'target'" in refused.err


def test_weights_say_how_many_classes_they_tell_apart(r2: R2, task: Path) -> None:
    network = models.build(models.spec("resnet8", classes=7, channels=3, size=16))
    torch.save(network.state_dict(), "seven.pth")
    for number in range(8):
        where = Path("tree", ("train", "val")[number % 2], ("b", "e")[number // 4])
        where.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(where / f"{number}.png")
    given = ("ptq", "--weights", "seven.pth", "--model", "resnet8", "--size", 16, "--overwrite", "--json")
    ran = r2(*given, "--data", "images:tree/train")  # nothing tells but the weights
    assert ran.code == 0 and json.loads(ran.out)["samples"], ran.err
    ran = r2(*given, "--data", "imagefolder:tree")
    assert ran.code == 2 and "seven.pth tells 7 classes apart and imagefolder:tree has 2" in ran.err, ran.err
    assert "--classes FILE" in ran.err and "images:DIR" in ran.err
    Path("names.txt").write_text("\n".join("abcdefg"))
    ran = r2(*given, "--data", "imagefolder:tree", "--classes", "names.txt")
    assert ran.code == 0 and json.loads(ran.out)["samples"] == 4, ran.err
    # Weights of another network are none of other classes.
    ran = r2(
        "ptq", "--weights", "seven.pth", "--model", "resnet20", "--data", "images:tree/train", "-o", "o.safetensors"
    )
    assert ran.code == 2 and "seven.pth does not hold the weights of resnet20" in ran.err


def test_pictures_without_labels_calibrate_a_classifier(r2: R2, trained: Path, tmp_path: Path) -> None:
    source = tmp_path / "model.safetensors"
    source.write_bytes(trained.read_bytes())
    for number in range(6):
        where = tmp_path / "pictures" / ("deep" if number % 2 else ".")
        where.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(where / f"{number}.png")
    ran = r2("ptq", source, "--data", f"images:{tmp_path / 'pictures'}", "--json")
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert report["top1"] is None and report["samples"] == 1 and report["options"]["calibration"] == 5
    given = ("--calibration-data", f"images:{tmp_path / 'pictures'}", "--overwrite", "--json")
    report = json.loads(r2("ptq", source, "--data", "digits:64", *given).out)
    assert report["top1"] > 60 and report["options"]["calibration"] == 5
    ran = r2("qat", source, "--data", f"images:{tmp_path / 'pictures'}", "--epochs", 1, "--batch-size", 4, "--json")
    report = json.loads(ran.out)
    assert ran.code == 0 and report["options"]["loss"] == "distill" and report["trained_value"] is None, ran.err


def test_bad_input_is_one_sentence_with_the_way_out(r2: R2, task: Path) -> None:
    with (task / "bad.npz").open("wb") as file:
        np.savez(file, x=np.array([{"a": 1}], dtype=object))
    (task / "plain.npz").write_bytes(pickle.dumps({"x": 1}))
    (task / "short.npz").write_bytes((task / "bad.npz").read_bytes()[:60])
    np.savez(task / "five.npz", x=np.zeros((4, 5), np.float32))
    for data, why in {
        "task.py:wrong": "task.py:wrong returned a str: it must return a dataset, a loader",
        "task.py:nothing": "unknown factory in task.py 'nothing'",
        "gone.py:data": "gone.py does not exist",
        "npz:bad.npz": "bad.npz: 'x' holds pickled objects, which r2 never loads",
        "npz:plain.npz": "plain.npz is not a readable .npz file",
        "npz:short.npz": "short.npz is not a readable .npz file",
        "npz:gone.npz": "gone.npz is not a readable .npz file",
        "npz:five.npz": "task.py:Net cannot take x float32 nx5",
        "images:.": "holds 0 pictures",
    }.items():
        ran = r2("ptq", *NET, "--data", data)
        assert ran.code == 2 and why in ran.err, (data, ran.err)
    for option, why in {
        ("--metric", "task.py:raises"): "--metric task.py:raises raised",
        ("--metric", "top1"): "labels are integers, and the target is float32 (6, 1)",
        ("--metric", "mea"): "unknown --metric 'mea'",
        ("--data-arg", "size=3"): "give --data-arg NAME=VALUE for each",
        ("--metric-lower",): "--metric-lower and --metric-arg belong to --metric",
    }.items():
        ran = r2("ptq", *FULL, *option)
        assert ran.code == 2 and why in ran.err, (option, ran.err)
    assert "--data-arg belongs to data of your own" in r2("pretrain", "--data-arg", "a=1").err


def test_which_names_are_code_of_one_s_own() -> None:
    code = ("task.py:data", "/a/b c/task.py:data", "C:\\x\\task.py:data", "package.module:data")
    assert all(map(own_code.is_code, code))
    data = ("digits", "digits:64", "imagefolder:a.b", "npz:a.npz", "images:/a/b.c:d", "images:a.b:c", "fake:3x8x8:2")
    assert not any(map(own_code.is_code, data))
    assert [own_code.label(name) for name in code[1::2]] == ["task.py:data", "package.module:data"]


def test_a_checkpoint_never_names_code_that_runs(r2: R2, task: Path) -> None:
    assert r2("ptq", *FULL, "-o", "q.safetensors").code == 0
    held = safetensors.torch.load_file(task / "q.safetensors")
    assert (
        held
        and "task.py:data is your own code and runs only when you name it: give --data" in r2("evaluate", "q.onnx").err
    )


def test_one_number_an_image_of_a_folder_is_measured_by_the_metric_that_is_named(r2: R2, task: Path) -> None:
    (task / "one.py").write_text(
        "from torch import nn\ndef one(): return nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(), nn.Linear(4, 1))\n"
    )
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(), nn.Linear(4, 1)).state_dict(), task / "one.pth")
    drawn = np.random.default_rng(0)
    for number in range(24):
        where = task / "folder" / ("train" if number % 3 else "val") / str(number % 2)
        where.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(where / f"{number}.png")
    given = ("ptq", "--weights", "one.pth", "--model", "one.py:one", "--data", "imagefolder:folder", "--size", 8)
    refused = r2(*given)
    assert refused.code == 2 and "gives one number for an image" in refused.err and "--metric auroc" in refused.err
    ran = r2(*given, "--metric", "auroc", "--json", "-o", "o.safetensors")
    assert ran.code == 0 and json.loads(ran.out)["metric"]["label"] == "AUROC", ran.err


def test_a_file_that_does_not_say_where_its_data_is_asks_for_it(r2: R2, task: Path) -> None:
    np.savez(task / "own.npz", x=np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32))
    given = ("--model", "task.py:Net", "--data", "npz:own.npz")
    assert r2("ptq", *NET[:2], *given, "-o", "q.safetensors").code == 0
    ran = r2("evaluate", "q.onnx")
    assert (
        ran.code == 2 and "its data was npz, and the file does not say where that is: give --data npz:FILE" in ran.err
    )
    ran = r2("export", "q.safetensors", *given, "-o", "e.onnx")
    assert ran.code == 0 and "next: r2 evaluate e.onnx --data npz:own.npz" in ran.out, ran.err
