"""One small valid file of every format that r2 reads, made once, and the commands that read it.

A command is a line of which `FILE` is the mutated file. It runs in a folder that holds all valid files.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper, save_model
from PIL import Image
from safetensors.torch import save_file

CPU = ("--data", "digits:64", "--device", "cpu")
TRAIN = ("pretrain", "--model", "resnet8", "--size", "8", *CPU, "--epochs", "1", "-o", "made.safetensors")
FLOAT, CODED, PALETTE, ONNX = "float.safetensors", "coded.safetensors", "palette.safetensors", "coded.onnx"
VECTOR = ("--model", "vector.py:factory")
CODE = """from torch import nn
def factory(num_classes=2):
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
"""
RECIPE = """# A recipe of one step.
[matrix]
bits = [8, 4]
reg = [{ name = "none" }, { name = "margin", weight = 0.1 }]

[[step]]
run = "pretrain"
model = "resnet8"
epochs = 1
seed = 3
output = "float-{reg}.safetensors"

[[step]]
run = "ptq"
source = "float-{reg}.safetensors"
weight-bits = "{bits}"
output = "w{bits}-{reg}.safetensors"

[[table]]
title = "bits"
run = "ptq"
rows = ["reg", "bits"]
metrics = { "top-1" = "top1" }
"""
DONE = """[[step]]
run = "analyze"
source = "../weights.safetensors"
quick = true
"""


@dataclass(frozen=True)
class Reader:
    """A format: the valid file in the folder, the lines that read it, and what they may write besides it."""

    file: str
    lines: tuple[tuple[str, ...], ...]
    writes: tuple[str, ...] = ()
    share: int = 10  # of a campaign's inputs, against the shares of the others


READERS = {
    "float": Reader(
        FLOAT,
        (
            ("evaluate", "FILE", "--dry-run", "--device", "cpu"),
            ("analyze", "FILE", "--quick", "--view", "trained", "-o", "page.html", "--overwrite"),
            ("export", "FILE", "-o", "out.onnx", "--dry-run"),
            ("palettize", "FILE", "-o", "out.safetensors", "--dry-run"),
        ),
        ("page.html",),
        share=30,
    ),
    "coded": Reader(
        CODED,
        (("evaluate", "FILE", *CPU, "--dry-run"), ("analyze", "FILE", "--quick"), ("export", "FILE", "--dry-run")),
        share=30,
    ),
    "palette": Reader(PALETTE, (("analyze", "FILE", "--quick"), ("evaluate", "FILE", "--dry-run")), share=20),
    "weights": Reader(
        "weights.safetensors",
        (("palettize", "FILE", "-o", "out.safetensors", "--overwrite"), ("analyze", "FILE", "--all")),
        ("out.safetensors", "out.manifest.json"),
        share=20,
    ),
    "shards": Reader("shards/model.safetensors.index.json", (("analyze", "FILE", "--quick"), ("analyze", "shards"))),
    "state": Reader("made.resume.safetensors", ((*TRAIN, "--resume"),), ("made.",), share=15),
    "record": Reader("coded.manifest.json", (("ptq", FLOAT, *CPU, "-o", CODED, "--resume"),), share=8),
    "pth": Reader("float.pth", (("evaluate", "--weights", "FILE", "--model", "resnet8", *CPU, "--dry-run"),), share=8),
    "onnx": Reader(
        ONNX,
        (
            ("analyze", "FILE", "--quick"),
            ("evaluate", "FILE", *CPU),
            ("verify", "FILE", *CPU[:2], "--runtime", "onnxruntime"),
            ("verify", "FILE", "--against", CODED, *CPU[:2], "--runtime", "onnxruntime"),
        ),
        share=30,
    ),
    "other-onnx": Reader(
        "other.onnx",
        (("analyze", "FILE"), ("evaluate", "FILE", *CPU), ("verify", "FILE", "--runtime", "onnxruntime")),
        share=30,
    ),
    "network": Reader(
        "network.onnx",
        (
            ("ptq", "FILE", *CPU, "-o", "n.safetensors", "--dry-run"),
            ("export", "FILE", *CPU[:2], "-o", "n.onnx", "--dry-run"),
            ("evaluate", "FILE", *CPU),
        ),
        share=20,
    ),
    "graph": Reader(
        "graph.safetensors",
        (("evaluate", "FILE", *CPU, "--dry-run"), ("export", "FILE", *CPU[:2], "-o", "n.onnx", "--dry-run")),
        share=20,
    ),
    "npz": Reader(
        "arrays.npz",
        (
            (
                "ptq",
                "--weights",
                "vector.pth",
                *VECTOR,
                "--data",
                "npz:FILE",
                *CPU[2:],
                "-o",
                "v.safetensors",
                "--dry-run",
            ),
        ),
        share=10,
    ),
    "recipe": Reader("recipe.toml", (("run", "FILE", "--dry-run"), ("run", "FILE", "--dry-run", "--only", "w4*"))),
    "results": Reader(
        "done/results.json",
        (("run", "done.toml", "--work-dir", "done"), ("run", "done.toml", "--work-dir", "done", "--resume")),
        ("done",),
        share=8,
    ),
    "image": Reader(
        "images/val/1/0.png",
        (("evaluate", "seen.safetensors", "--data", "imagefolder:images", "--device", "cpu", "--workers", "0"),),
        share=5,
    ),
    "bmp": Reader(
        "images/val/0/0.bmp",
        (("pretrain", "--model", "resnet8", "--data", "imagefolder:images", "--dry-run", "-o", "a.safetensors"),),
        share=3,
    ),
    "text": Reader(
        "text.safetensors",
        (("evaluate", "FILE", "--data", "qnli:pairs.tsv", "--device", "cpu", "--dry-run"),),
        share=10,
    ),
    "tsv": Reader(
        "pairs.tsv",
        (("evaluate", "text.safetensors", "--data", "qnli:FILE", "--device", "cpu", "--dry-run"),),
        share=6,
    ),
}


def make(folder: Path) -> None:
    """Write every valid file into `folder`, by r2's own commands where one writes the format."""
    from r2cli.cli.main import invoke

    def r2(*line: str) -> None:
        invoke([*line, "--json"])

    r2(*TRAIN[:-1], FLOAT, "--reg", "margin")
    r2("ptq", FLOAT, *CPU, "-o", CODED)
    r2("palettize", FLOAT, *CPU, "--method", "kmeans", "-o", "kmeans.safetensors")
    _weights(folder)
    r2("palettize", "weights.safetensors", "--dim", "2", "--bits", "3", "-o", PALETTE)
    _state(r2)
    _onnx(folder / "other.onnx")
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "done.toml").write_text(DONE)
    r2("run", "done.toml", "--work-dir", "done")
    _images(folder / "images")
    line = ("pretrain", "--model", "resnet8", "--data", "imagefolder:images", "--epochs", "1", "--device", "cpu")
    r2(*line, "--workers", "0", "-o", "seen.safetensors")
    _text(folder, r2)
    _arrays(folder)
    _network(folder / "network.onnx")
    r2("ptq", "network.onnx", *CPU, "-o", "graph.safetensors")


def _network(path: Path) -> None:
    """A float network that comes as a file, with shapes that are computed and a norm that is kept."""
    drawn = np.random.default_rng(1)

    def held(name: str, *shape: int, kind: type = np.float32) -> TensorProto:
        return numpy_helper.from_array(abs(drawn.normal(size=shape)).astype(kind), name)

    parts = [held("conv.weight", 4, 1, 3, 3), held("fc.weight", 10, 4 * 16), held("fc.bias", 10)]
    parts += [held(f"norm.{name}", 4) for name in ("weight", "bias", "mean", "var")]
    parts += [numpy_helper.from_array(np.array(values), name) for name, values in (("first", [0]), ("rest", [-1]))]
    nodes = [
        helper.make_node(
            "Conv", ["images", "conv.weight"], ["a"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2]
        ),
        helper.make_node("BatchNormalization", ["a", *(f"norm.{n}" for n in ("weight", "bias", "mean", "var"))], ["b"]),
        helper.make_node("Clip", ["b"], ["c"]),
        helper.make_node("Shape", ["c"], ["shape"]),
        helper.make_node("Gather", ["shape", "first"], ["batch"]),
        helper.make_node("Concat", ["batch", "rest"], ["flat"], axis=0),
        helper.make_node("Reshape", ["c", "flat"], ["d"]),
        helper.make_node("Gemm", ["d", "fc.weight", "fc.bias"], ["logits"], transB=1),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 1, 8, 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 10])
    graph = helper.make_graph(nodes, "network", [images], [logits], parts)
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)


def _arrays(folder: Path) -> None:
    (folder / "vector.py").write_text(CODE)
    drawn = np.random.default_rng(0)
    x = drawn.normal(size=(12, 6)).astype(np.float32)
    np.savez(folder / "arrays.npz", x=x, target=x.argmax(1) % 2)
    network = {"0.weight": (4, 6), "0.bias": (4,), "2.weight": (2, 4), "2.bias": (2,)}
    torch.save(
        {name: torch.from_numpy(drawn.normal(size=shape)).float() for name, shape in network.items()},
        folder / "vector.pth",
    )


def _weights(folder: Path) -> None:
    from r2cli.storage import checkpoint

    tensors = checkpoint.load_tensors(folder / FLOAT)[0]
    torch.save({"state_dict": tensors, "epoch": 3}, folder / "float.pth")
    torch.manual_seed(0)
    own = {"a.weight": torch.randn(8, 6), "b.weight": torch.randn(4, 2, 3, 3).half(), "b.bias": torch.ones(4)}
    save_file(own, folder / "weights.safetensors")
    shards = folder / "shards"
    shards.mkdir()
    save_file({"a.weight": own["a.weight"]}, shards / "one.safetensors")
    save_file({"b.weight": own["b.weight"], "b.bias": own["b.bias"]}, shards / "two.safetensors")
    where = {"a.weight": "one.safetensors", "b.weight": "two.safetensors", "b.bias": "two.safetensors"}
    (shards / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def _state(r2: Callable[..., None]) -> None:
    """A training run that ended after its last epoch and before its checkpoint."""
    from r2cli.storage import atomic

    def stop(step: str, path: Path) -> None:
        if (step, path.name) == ("create", "made.safetensors"):
            raise KeyboardInterrupt

    atomic.watchers.append(stop)
    try:
        r2(*TRAIN)
    except KeyboardInterrupt:
        pass
    finally:
        atomic.watchers.remove(stop)


def _onnx(path: Path) -> None:
    """What another tool writes: shapes that are computed, weights that are decoded, nodes of many kinds."""

    def constant(name: str, values: object, kind: torch.dtype) -> TensorProto:
        return numpy_helper.from_array(torch.tensor(values, dtype=kind).numpy(), name)

    torch.manual_seed(1)
    weight = torch.randint(-100, 100, (10, 64)).tolist()
    parts = [
        constant("codes", weight, torch.int8),
        constant("scale", 0.01, torch.float32),
        constant("zero", 0, torch.int8),
        constant("shape", [-1, 64], torch.int64),
        constant("repeats", [1, 1], torch.int64),
        constant("tall", [10, 64], torch.int64),
        constant("rows", list(range(10)), torch.int64),
        *(constant(name, value, torch.int64) for name, value in (("from", 0), ("to", 10), ("by", 1))),
    ]
    nodes = [
        helper.make_node("Reshape", ["images", "shape"], ["flat"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["decoded"]),
        helper.make_node("ConstantOfShape", ["tall"], ["zeros"]),
        helper.make_node("Add", ["decoded", "zeros"], ["sum"]),
        helper.make_node("Range", ["from", "to", "by"], ["order"]),
        helper.make_node("Gather", ["sum", "order"], ["gathered"], axis=0),
        helper.make_node("Tile", ["gathered", "repeats"], ["tiled"]),
        helper.make_node("Gemm", ["flat", "tiled"], ["logits"], transB=1),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 1, 8, 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 10])
    graph = helper.make_graph(nodes, "other", [images], [logits], parts)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    recorded = {
        "r2.input": {"channels": 1, "size": 8, "resize": 8, "mean": [0.5], "std": [0.5]},
        "r2.history": [{"options": {"data": "digits"}}],
        "r2.class_names": [str(digit) for digit in range(10)],
    }
    helper.set_model_props(made, {key: json.dumps(value) for key, value in recorded.items()})
    save_model(made, path)


def _images(folder: Path) -> None:
    draw = torch.Generator().manual_seed(2)
    for half in ("train", "val"):
        for name, ending in (("0", "bmp"), ("1", "png")):
            (folder / half / name).mkdir(parents=True)
            for number in range(3):
                pixels = torch.randint(256, (12, 12, 3), generator=draw, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / half / name / f"{number}.{ending}")


def _text(folder: Path, r2: Callable[..., None]) -> None:
    from r2cli.models import text

    encoder = folder / "encoder"
    encoder.mkdir()
    torch.manual_seed(0)
    text.write_tiny(encoder, "which is old the was long river city".split())
    rows = [f"{i}\twhich city is old\tthe {b} was long\t{b == 'city'}" for i in range(6) for b in ("river", "city")]
    (folder / "pairs.tsv").write_text("\n".join(["index\tquestion\tsentence\tlabel", *rows]) + "\n")
    data = ("--model", "text:encoder", "--data", "qnli:pairs.tsv", "--size", "16", "--epochs", "1")
    r2("pretrain", *data, "-o", "text.safetensors")
    shutil.rmtree(encoder)
