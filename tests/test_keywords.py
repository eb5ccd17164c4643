"""What a checkpoint may say about the network that is made from it: never what else is loaded, fetched or run."""

import json
import pickle
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import R2
from r2cli import models
from r2cli.errors import InputError
from r2cli.storage import checkpoint
from r2cli.storage.checkpoint import Checkpoint, InputSpec, ModelSpec
from r2cli.storage.keywords import require_safe


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Every connection fails, and is counted: no test here may even try."""
    tried: list[object] = []

    def refuse(*args: object, **more: object) -> None:
        tried.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield tried
    assert not tried


class Payload:
    """A pickle that leaves a mark where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.write_text, (self.mark, "code ran")


IMAGE = InputSpec(3, 32, 32, (0.5,), (0.5,))
TINY = {
    "model_type": "bert",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 8,
    "vocab_size": 20,
}


def planted(path: Path, name: str, args: dict[str, Any]) -> Path:
    """A checkpoint of network `name` with the keywords `args`, as anybody can write one."""
    spec = ModelSpec(name, 2, args=args)
    checkpoint.save(Checkpoint(spec, IMAGE, ("a", "b"), {"w": torch.ones(2, 3)}), path)
    return path


# One of each family and each way to load: a path, a file here, an address, pre-trained weights, code from a hub.
LOADERS: list[tuple[str, dict[str, Any], str]] = [
    ("timm:resnet18", {"checkpoint_path": "{raw}"}, "checkpoint_path"),
    ("timm:resnet18", {"checkpoint_path": "raw"}, "checkpoint_path"),
    ("timm:resnet18", {"pretrained": True}, "pretrained"),
    ("timm:resnet18", {"pretrained_cfg": {"file": "{raw}"}}, "pretrained_cfg"),
    ("timm:resnet18", {"pretrained_cfg": {"url": "https://example.org/w.pth"}}, "pretrained_cfg"),
    ("timm:resnet18", {"pretrained_cfg_overlay": {"hf_hub_id": "a/b"}}, "pretrained_cfg_overlay"),
    ("timm:resnet18", {"cache_dir": "here"}, "cache_dir"),
    ("timm:resnet18", {"act_layer": "https://example.org/w.pth"}, "act_layer"),
    ("resnet18", {"weights": "DEFAULT"}, "weights"),
    ("resnet18", {"weights": "IMAGENET1K_V1"}, "weights"),
    ("mobilenet_v3_large", {"weights_backbone": "DEFAULT"}, "weights_backbone"),
    ("resnet18", {"pretrained": True}, "pretrained"),
    ("text:bert", {**TINY, "_name_or_path": "a/b"}, "_name_or_path"),
    ("text:bert", {**TINY, "auto_map": {"AutoConfig": "evil--evil"}}, "auto_map"),
    ("text:bert", {**TINY, "attn_implementation": "kernels-community"}, "attn_implementation"),
    ("text:bert", {**TINY, "text_config": {"_attn_implementation": "a"}}, "text_config"),
    ("text:bert", {**TINY, "backbone": "resnet18", "use_pretrained_backbone": True}, "backbone"),
    ("text:bert", {**TINY, "quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ("text:bert", {**TINY, "hidden_act": "../raw"}, "hidden_act"),
    ("onnx", {"graph": "../raw"}, "graph"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "args", "key"), LOADERS, ids=lambda value: str(value)[:40])
def test_a_checkpoint_cannot_choose_what_is_loaded(
    name: str, args: dict[str, Any], key: str, r2: R2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mark, raw = tmp_path / "mark", tmp_path / "raw"
    raw.write_bytes(pickle.dumps(Payload(mark)))
    args = json.loads(json.dumps(args).replace("{raw}", str(raw)))
    path = planted(tmp_path / "evil.safetensors", name, args)
    with pytest.raises(InputError, match=f"keyword '{key}'"):
        checkpoint.load(path)
    for command in (["analyze", path], ["evaluate", path], ["export", path], ["ptq", path], ["palettize", path]):
        ran = r2(*command)
        if command[0] != "analyze":  # analyze reads the weights, and makes no network
            assert ran.code == 2 and f"'{key}'" in ran.err
    # What reaches a factory by another way is refused there as well.
    with pytest.raises(InputError):
        models.build(replace(ModelSpec(name, 2), args=args))
    assert not mark.exists()


def test_networks_of_r2_s_own_load_nothing_either(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="keyword 'checkpoint'"):
        checkpoint.load(planted(tmp_path / "evil.safetensors", "resnet8", {"checkpoint": "raw"}))


@pytest.mark.parametrize("name", ["timm:hf-hub:a/b", "timm:local-dir:here", "timm:../x", "text:../bert", "../x"])
def test_a_network_has_no_place(name: str, r2: R2, tmp_path: Path) -> None:
    ran = r2("export", planted(tmp_path / "evil.safetensors", name, {}))
    assert ran.code == 2 and "Traceback" not in ran.err


@pytest.mark.slow
@pytest.mark.parametrize(
    "data", ["imagefolder:/etc", "qnli:/etc/passwd", "cifar10:/x", "text.py:run", 3, None, ["digits"]]
)
def test_a_checkpoint_cannot_choose_a_folder(data: object, r2: R2, tmp_path: Path, trained: Path) -> None:
    made = checkpoint.load(trained)
    first = {**made.history[0], "options": {**made.history[0]["options"], "data": data}}
    path = tmp_path / "evil.safetensors"
    checkpoint.save(replace(made, history=(first,)), path)
    assert r2("evaluate", path).code == 2


@pytest.mark.slow
def test_a_checkpoint_fetches_no_data(r2: R2, tmp_path: Path, trained: Path) -> None:
    made = checkpoint.load(trained)
    first = {**made.history[0], "options": {**made.history[0]["options"], "data": "cifar10"}}
    path = tmp_path / "model.safetensors"
    checkpoint.save(replace(made, history=(first,)), path)
    ran = r2("evaluate", path, "--data-dir", tmp_path / "data")
    assert ran.code == 2 and "--data cifar10" in ran.err


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("timm:resnet18", {"drop_rate": 0.1, "act_layer": "silu", "block_args": [1, 2], "global_pool": "avg"}),
        ("resnet18", {"norm_layer": None, "groups": 1, "replace_stride_with_dilation": [False, True, False]}),
        ("mobilenet_v2", {"width_mult": 0.5, "inverted_residual_setting": [[1, 16, 1, 1], [6, 24, 2, 2]]}),
        ("text:bert", {**TINY, "rope_parameters": {"rope_type": "default", "factor": 2.0}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_describes_a_network_is_fine(name: str, args: dict[str, Any]) -> None:
    require_safe(name, args, "the file")


@pytest.mark.slow
def test_keywords_of_own_code_are_named_again(r2: R2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file's keyword for the user's own factory may be a path only where the command line gives it."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(
        "from torch import nn\n"
        "def make(settings, num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
    )
    common = ["--model", "net.py:make", "--model-arg", "settings=a/b.yaml"]
    assert r2("pretrain", *common, "--size", "8", "--epochs", "1").code == 0
    ran = r2("evaluate", "--model", "net.py:make")
    assert ran.code == 2 and "'settings'" in ran.err
    assert r2("evaluate", *common).code == 0
