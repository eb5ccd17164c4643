"""`--classes FILE`: labels as the network numbers them, and folders of a part of its classes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import R2
from r2cli import data
from r2cli.errors import InputError

NAMES = ("ant", "dog", "bee", "cat", "cow", "elk")
NET = """
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 6))
"""


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """set/train has cats and dogs, set/val dogs alone; names.txt lists six classes, and net.py has as many logits."""
    monkeypatch.chdir(tmp_path)
    for place, (half, kind) in enumerate((("train", "cat"), ("train", "dog"), ("val", "dog"))):
        own = tmp_path / "set" / half / kind
        own.mkdir(parents=True)
        for number in range(4):
            pixels = np.random.default_rng(10 * place + number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(own / f"{number}.png")
    Path("names.txt").write_text("\n".join(NAMES) + "\n")
    Path("net.py").write_text(NET)
    return tmp_path / "set"


def test_labels_are_the_network_s(folders: Path) -> None:
    found = data.load(f"imagefolder:{folders}", workers=0, classes=NAMES)
    assert found.class_names == NAMES
    assert [int(label) for _, labels in found.train.batches(8, torch.device("cpu")) for label in labels] == [3] * 4 + [
        1
    ] * 4
    assert [int(label) for _, labels in found.test.batches(8, torch.device("cpu")) for label in labels] == [1] * 4


def test_two_halves_of_other_folders_want_the_names(folders: Path) -> None:
    shutil.copytree(folders / "val" / "dog", folders / "val" / "cow")
    shutil.copytree(folders / "val" / "dog", folders / "train" / "cow")
    with pytest.raises(InputError, match="'cat'.*--classes FILE"):
        data.load(f"imagefolder:{folders}", workers=0)


@pytest.mark.slow
def test_a_network_of_more_classes_keeps_their_names(r2: R2, folders: Path) -> None:
    from torch import nn

    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 6))
    with torch.no_grad():
        network.get_parameter("3.weight").mul_(0.01)
        network.get_parameter("3.bias").copy_(torch.tensor([0.0, 5, 1, 2, 3, 4]))  # all is a dog
    torch.save(network.state_dict(), "net.pth")
    common = ["--data", f"imagefolder:{folders}", "--model", "net.py:net"]
    ran = r2("ptq", "--weights", "net.pth", *common, "--classes", "names.txt", "--json", "-o", "net.safetensors")
    assert ran.code == 0 and json.loads(ran.out)["top1"] == 100, ran.err
    again = r2("evaluate", "net.safetensors", *common, "--json")
    assert again.code == 0 and json.loads(again.out)["top1"] == 100, again.err
    file = r2("evaluate", "net.onnx", "--data", f"imagefolder:{folders}", "--json")
    assert file.code == 0 and json.loads(file.out)["top1"] == 100, file.err
    (folders / "train" / "yak").mkdir()
    Image.new("RGB", (8, 8)).save(folders / "train" / "yak" / "0.png")
    refused = r2("ptq", "--weights", "net.pth", *common, "--classes", "names.txt")
    assert refused.code == 2 and "'yak'" in refused.err and "names.txt" in refused.err


@pytest.mark.parametrize(
    ("text", "told"), [("cat\ndog\ncat\n", "'cat' 2 times"), ("cat\n", "1 lines"), (b"\xff\xfe\x00", "UTF-8")]
)
def test_a_list_that_is_none_is_refused(r2: R2, folders: Path, text: str | bytes, told: str) -> None:
    Path("bad.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    ran = r2("pretrain", "--data", f"imagefolder:{folders}", "--classes", "bad.txt", "-o", "x.safetensors")
    assert ran.code == 2 and told in ran.err and "bad.txt" in ran.err
