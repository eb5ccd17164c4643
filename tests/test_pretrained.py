"""--pretrained: the weights that torchvision and timm publish, from their own cache or download."""

import json
import pickle
import socket
from pathlib import Path

import pytest
import torch
import torchvision

from conftest import R2

NAME, DATA = "squeezenet1_1", ("--data", "fake:3x64x64:1000", "--size", 64)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torchvision's place for the weights of SqueezeNet, in an empty cache, where the network cannot be reached."""

    def unreachable(*arguments: object, **options: object) -> None:
        raise OSError("the network is unreachable")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder / torchvision.models.get_model_weights(NAME).DEFAULT.url.rpartition("/")[2]


@pytest.mark.slow
def test_published_weights_are_taken(cache: Path, r2: R2) -> None:
    torch.manual_seed(3)
    network = torchvision.models.get_model(NAME).eval()
    torch.save(network.state_dict(), cache)
    ran = r2("export", "--model", NAME, "--pretrained", *DATA, "--no-eval", "--json")
    assert ran.code == 0, ran.err
    import onnx
    import onnxruntime

    assert json.loads(ran.out)["output"] == f"{NAME}.onnx"
    written = {entry.key: json.loads(entry.value) for entry in onnx.load(f"{NAME}.onnx").metadata_props}
    assert written["r2.history"][0]["options"]["weights"] == "pretrained"
    assert written["r2.input"]["mean"] == [0.485, 0.456, 0.406]  # as they were trained
    images = torch.randn(2, 3, 64, 64)
    (logits,) = onnxruntime.InferenceSession(f"{NAME}.onnx").run(None, {"input": images.numpy()})
    assert torch.allclose(torch.from_numpy(logits), network(images), atol=1e-4)


def test_a_published_file_runs_no_code(cache: Path, r2: R2, tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    cache.write_bytes(pickle.dumps(Runs()))
    ran = r2("export", "--model", NAME, "--pretrained", *DATA)
    assert ran.code == 2 and "could not be had" in ran.err and not (tmp_path / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--model", NAME, "--pretrained", *DATA), "could not be had"),
        (("--model", NAME, *DATA), "--pretrained"),
        (("--model", NAME, "--pretrained", "--data", "fake:3x64x64:10"), "1000 classes"),
        (("--model", "resnet8", "--pretrained", *DATA), "nobody publishes weights of resnet8"),
        (("--model", NAME, "--pretrained"), "give --data"),
        (("--pretrained", *DATA), "give --model"),
        (("m.safetensors", "--model", NAME, "--pretrained", *DATA), "two networks"),
        (("--model", NAME, "--weights", "w.pth", "--pretrained", *DATA), "two networks"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(given: tuple[str, ...], says: str, cache: Path, r2: R2) -> None:
    ran = r2("ptq", *given)
    assert ran.code == 2 and ran.out == "", ran.err
    assert says in ran.err.splitlines()[-1] and "Traceback" not in ran.err


@pytest.mark.slow
def test_timm_publishes_too(cache: Path, r2: R2, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    built = timm.create_model

    def create(name: str, pretrained: bool, **keywords: object) -> torch.nn.Module:
        """timm's own, with weights that were downloaded long ago."""
        network: torch.nn.Module = built(name, pretrained=False, **keywords)
        if pretrained:
            torch.nn.init.constant_(network.get_parameter("head.bias"), 2.5)
        return network

    monkeypatch.setattr(timm, "create_model", create)
    given = ("--model", "timm:test_vit.r160_in1k", "--pretrained", "--data", "fake:3x16x16:1000", "--size", 160)
    ran = r2("export", *given, "--no-eval", "--json")
    assert ran.code == 0, ran.err
    import onnx

    (file,) = Path().glob("*.onnx")
    held = {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(file).graph.initializer}
    assert (held["head.bias"] == 2.5).all()
