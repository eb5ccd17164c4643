"""Checkpoints: the same tensors, codes and bytes back; readable without r2 where float; nothing half-written."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from r2cli import models
from r2cli.errors import InputError, R2Error
from r2cli.quantized.coded import Codec, Coded
from r2cli.quantized.grid import Grid
from r2cli.quantized.packing import packed_bytes
from r2cli.quantized.palette import Palette
from r2cli.storage import atomic, checkpoint
from r2cli.storage.checkpoint import Checkpoint, InputSpec, ModelSpec

SPEC = ModelSpec("resnet8", classes=10, channels=1, stem="small")
INPUT = InputSpec(channels=1, size=8, resize=8, mean=(0.3053,), std=(0.3763,))
NAMES = tuple("0123456789")


def int32(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def grid(
    bits: int, scale: object, zero: object = 0, *, signed: bool = True, axis: int | None = None, midrise: bool = False
) -> Grid:
    step = torch.tensor(scale, dtype=torch.float32)
    return Grid(step, int32(zero).expand(step.shape).clone(), bits, signed, axis, midrise)


def every_code(codec: Grid) -> Tensor:
    """Three rows that hold every code of a grid and end within a byte."""
    count = codec.highest - codec.lowest + 1
    row = torch.arange(count + 1).remainder(count) + codec.lowest
    return row.repeat(3, 1).to(codec.dtype)


CODECS: dict[str, Coded] = {
    **{f"plain {bits}": Coded(g, every_code(g)) for bits in range(1, 9) for g in [grid(bits, 0.1)]},
    **{f"midrise {bits}": Coded(g, every_code(g)) for bits in range(1, 9) for g in [grid(bits, 0.3, midrise=True)]},
    **{
        f"channels {bits}": Coded(g, every_code(g))
        for bits in (3, 4, 8)
        for g in [grid(bits, [1e-6, 0.1, 1e3], [0, 2, 5], signed=False, axis=0)]
    },
    "palette int8": Coded(
        Palette(torch.tensor([[[-128], [-3], [0], [127]]], dtype=torch.int8), torch.tensor([0.1, 3.0]), 2, (2, 7), 0),
        torch.arange(14).remainder(4).reshape(1, 14).to(torch.uint8),
    ),
    "palette of vectors": Coded(
        Palette(torch.randn(2, 8, 2, generator=torch.Generator().manual_seed(0)), torch.tensor(0.1), 3, (4, 3, 1, 1)),
        torch.arange(6).reshape(2, 3).to(torch.uint8),
    ),
}


def network() -> Checkpoint:
    torch.manual_seed(0)
    return Checkpoint(SPEC, INPUT, NAMES, models.build(SPEC).state_dict())


def coded(parts: dict[str, Coded]) -> Checkpoint:
    return Checkpoint(SPEC, INPUT, NAMES, {"bias": torch.tensor([0.1, -0.2])}, parts)


def rewritten(path: Path, change: dict[str, Any]) -> None:
    """The file again with some of its r2 metadata changed."""
    tensors, metadata = checkpoint.load_tensors(path)
    meta = json.loads(metadata["r2"]) | change
    checkpoint.save_tensors(path, tensors, {"r2": json.dumps(meta)})


def require_same(a: Codec, b: Codec) -> None:
    assert type(a) is type(b)
    for field in fields(a):
        one, other = getattr(a, field.name), getattr(b, field.name)
        if isinstance(one, Tensor):
            assert one.dtype == other.dtype and one.equal(other), field.name
        else:
            assert one == other, field.name


# --- float checkpoints ---------------------------------------------------------------------------------------------


def test_a_float_checkpoint_needs_no_r2_to_be_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    saved = network()
    checkpoint.save(saved, path)
    plain = safetensors.torch.load_file(path)
    assert plain.keys() == saved.floats.keys()
    torch.manual_seed(1)
    model = models.build(SPEC)
    assert not model.get_parameter("conv.weight").equal(saved.floats["conv.weight"])
    model.load_state_dict(plain)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == saved.floats[name].dtype and tensor.equal(saved.floats[name]), name


def test_every_field_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    spec = ModelSpec("mobilenet_v2", classes=3, channels=4, stem="imagenet", width=0.35)
    shown = InputSpec(channels=4, size=96, resize=110, mean=(0.1, 0.2, 0.3, 0.4), std=(1 / 3, 0.5, 0.25, 0.125))
    floats = {
        "float32": torch.randn(3, 4),
        "float16": torch.randn(3).half(),
        "bfloat16": torch.randn(3).bfloat16(),
        "int64": torch.tensor(7),
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    grids = {
        "conv1": grid(8, 0.1, 3, signed=False),
        "add_1": grid(4, 1e-6, -2),
        "midrise": grid(2, 1 / 3, midrise=True),
    }
    parts = {"fc.weight": CODECS["plain 4"]}
    more: dict[str, Any] = {"target": "qnn", "outputs": ("logits", "aux")}
    first = Checkpoint(spec, shown, ("a", "é", "c d"), floats, parts, grids, folded=True, **more)
    first = first.then("pretrain", {"lr": 0.1, "reg": None}, {"top1": 97.3}).then("ptq", {"keep": ["a=8"]}, {})
    checkpoint.save(first, path)
    back = checkpoint.load(path)
    assert {field.name for field in fields(Checkpoint)} == {
        *("model", "input", "class_names", "floats", "coded", "activations", "folded", "history", "target", "origin"),
        "outputs",
    }
    assert (back.model, back.input, back.class_names, back.folded) == (spec, shown, ("a", "é", "c d"), True)
    assert (back.history, back.target, back.outputs) == (first.history, "qnn", ("logits", "aux"))
    assert [entry["command"] for entry in back.history] == ["pretrain", "ptq"]
    assert back.floats.keys() == floats.keys()
    for name, tensor in floats.items():
        assert back.floats[name].dtype == tensor.dtype and back.floats[name].equal(tensor), name
    assert back.activations.keys() == grids.keys()
    for name, own in grids.items():
        require_same(back.activations[name], own)
    require_same(back.coded["fc.weight"].codec, parts["fc.weight"].codec)
    assert back.coded["fc.weight"].codes.equal(parts["fc.weight"].codes)


def test_the_same_work_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    checkpoint.save(network().then("pretrain", {"seed": 0}, {"top1": 97.3}), first)
    checkpoint.save(network().then("pretrain", {"seed": 0}, {"top1": 97.3}), second)
    assert first.read_bytes() == second.read_bytes()
    checkpoint.save(checkpoint.load(first), second)
    assert first.read_bytes() == second.read_bytes()
    checkpoint.save(network().then("pretrain", {"seed": 1}, {"top1": 97.3}), second)
    assert first.read_bytes() != second.read_bytes()


def test_the_order_of_names_is_not_in_the_bytes() -> None:
    def ordered(names: list[str]) -> bytes:
        floats = {name: torch.full((3,), float(len(name))) for name in names}
        parts = {f"{name}.weight": CODECS[name] for name in names}
        grids = {name: grid(8, 0.1) for name in names}
        made = Checkpoint(SPEC, INPUT, NAMES, floats, parts, grids)
        return checkpoint.to_bytes(made.then("ptq", dict.fromkeys(names, 1), {}))

    names = ["plain 4", "midrise 2", "channels 8", "palette int8"]
    assert ordered(names) == ordered(names[::-1])


# --- coded checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODECS)
def test_codes_and_codec_come_back(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    own = CODECS[name]
    checkpoint.save(coded({"w": own}), path)
    back = checkpoint.load(path)
    assert back.floats.keys() == {"bias"} and back.coded.keys() == {"w"}
    require_same(back.coded["w"].codec, own.codec)
    assert back.coded["w"].codes.dtype == own.codes.dtype
    assert back.coded["w"].codes.equal(own.codes)
    assert back.coded["w"].decode().equal(own.decode())
    content = path.read_bytes()
    checkpoint.save(back, path)
    assert path.read_bytes() == content


def test_all_kinds_of_codes_live_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.save(coded(CODECS), path)
    back = checkpoint.load(path)
    assert back.coded.keys() == CODECS.keys()
    for name, own in CODECS.items():
        require_same(back.coded[name].codec, own.codec)
        assert back.coded[name].codes.equal(own.codes)


@pytest.mark.parametrize(("bits", "midrise"), [(1, True), (2, False), (2, True), (3, False), (4, False), (8, False)])
def test_a_coded_tensor_takes_its_packed_size(bits: int, midrise: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    count = 40_001
    codec = grid(bits, 0.1, midrise=midrise)
    codes = torch.randint(codec.lowest, codec.highest + 1, (count,)).to(codec.dtype)
    checkpoint.save(Checkpoint(SPEC, INPUT, NAMES, {}, {"w": Coded(codec, codes)}), path)
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")  # safetensors: its length, then JSON, then the tensors
    assert len(content) - 8 - header == packed_bytes(count, bits) + 4  # one float32 scale
    assert packed_bytes(count, bits) == -(-count * bits // 8) + (bits == 3)  # two planes of three bits, each padded
    assert header < 1200  # names, shapes and this metadata are some 800 characters


def test_tensors_may_share_a_scale(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    shared = grid(4, 0.1)
    parts = {name: Coded(shared, every_code(shared)) for name in ("a", "b")}
    checkpoint.save(coded(parts), path)
    assert checkpoint.load(path).coded["b"].codes.equal(parts["b"].codes)


# --- what cannot be read -------------------------------------------------------------------------------------------


def refused(path: Path) -> str:
    """The message of the InputError; every one names the file."""
    with pytest.raises(InputError) as caught:
        checkpoint.load(path)
    assert caught.value.exit_code == 2
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "no such.safetensors")
    refused(tmp_path)


@pytest.mark.parametrize("length", [0, 4, 8, 100, 0.5, -1])
def test_a_truncated_file_is_refused(length: float, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    content = checkpoint.to_bytes(network())
    path.write_bytes(content[: int(length * len(content)) if isinstance(length, float) else length])
    refused(path)


def test_random_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    for size in (1, 7, 8, 9, 100, 5000):
        path.write_bytes(bytes(torch.randint(0, 256, (size,), generator=generator).tolist()))
        refused(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_foreign_safetensors_file_is_refused(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path, metadata=metadata)
    refused(path)


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.save(network(), path)
    rewritten(path, {"format": checkpoint.FORMAT})
    assert checkpoint.load(path).model == SPEC  # what `rewritten` writes can be read
    rewritten(path, {"format": checkpoint.FORMAT + 98})
    assert str(checkpoint.FORMAT + 98) in refused(path)


@pytest.mark.parametrize(
    "change",
    [
        {"model": {}},
        {"model": {"name": "resnet8", "classes": 10, "depth": 3}},
        {"input": {}},
        {"class_names": None},
        {"codecs": {"w": {"kind": "grid"}}},
        {"codecs": {"bias": {"kind": "grid", "bits": 4, "shape": [2]}}},
        {"activations": {"conv": {"bits": 8}}},
        pytest.param({"codecs": []}),
        pytest.param({"activations": 3}),
    ],
)
def test_damaged_metadata_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.save(coded({}), path)
    rewritten(path, change)
    refused(path)


def test_codes_that_do_not_fill_their_shape_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.save(coded({"w": CODECS["plain 4"]}), path)
    tensors, metadata = checkpoint.load_tensors(path)
    checkpoint.save_tensors(path, tensors | {"w.codes": tensors["w.codes"][:-1]}, metadata)
    refused(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_names_its_tensor(value: float, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    saved = network()
    weight = saved.floats["classifier.weight"].clone()
    weight[3, 5] = value
    checkpoint.save(replace(saved, floats={**saved.floats, "classifier.weight": weight}), path)
    assert "classifier.weight" in refused(path)


def test_a_scale_that_is_no_number_names_its_tensor(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    bad = grid(4, [0.1, float("nan"), 0.2], axis=0)
    checkpoint.save(coded({"w": Coded(bad, every_code(bad))}), path)
    assert "w.scale" in refused(path)


def test_a_centroid_that_is_no_number_names_its_tensor(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    palette = Palette(torch.tensor([[[float("nan")], [1.0]]]), torch.tensor(1.0), 1, (2, 2))
    checkpoint.save(coded({"w": Coded(palette, torch.zeros(1, 4, dtype=torch.uint8))}), path)
    assert "w.lut" in refused(path)


def test_an_activation_scale_that_is_no_number_names_its_edge(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.save(replace(coded({}), activations={"conv_7": grid(8, float("nan"))}), path)
    assert "conv_7" in refused(path)


# --- writing -------------------------------------------------------------------------------------------------------


def test_writing_makes_the_folder_and_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    atomic.write_atomically(path, b"first")
    with open(path, "rb") as reader:
        atomic.write_atomically(path, b"second")
        assert reader.read() == b"first"  # whoever reads the old file reads it to its end
    assert path.read_bytes() == b"second"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    path = tmp_path / "file" / "model.safetensors"
    with pytest.raises(R2Error) as caught:
        atomic.write_atomically(path, b"content")
    assert caught.value.exit_code == 3
    assert str(path) in str(caught.value)


@pytest.mark.slow
def test_a_failing_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"what was there")
    script = """
        import json, resource, signal, sys
        from pathlib import Path
        from r2cli.storage import atomic
        from r2cli.errors import R2Error

        path = Path(sys.argv[1])
        # The kernel refuses the 4097th byte of any file with EFBIG, as a full disk would with ENOSPC.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            atomic.write_atomically(path, bytes(100_000))
        except R2Error as error:
            print(json.dumps({"code": error.exit_code, "message": str(error)}))
        atomic.write_atomically(path.with_name("small"), bytes(4096))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "error::UserWarning"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["code"] == 3
    assert str(path) in told["message"]
    assert path.read_bytes() == b"what was there"
    assert {entry.name for entry in tmp_path.iterdir()} == {"model.safetensors", "small"}


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"what was there")

    def stopped(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stopped)
    with pytest.raises(KeyboardInterrupt):
        atomic.write_atomically(path, b"new")
    assert path.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [path]


def test_bits_a_weight_count_those_that_stay_float() -> None:
    codes = Coded(grid(8, 0.1), torch.zeros(4, 5, dtype=torch.int8))
    floats = {"gru.weight_ih_l0": torch.zeros(6, 10), "gru.bias_ih_l0": torch.zeros(6)}
    made = Checkpoint(SPEC, INPUT, NAMES, floats, coded={"head.weight": codes})
    assert made.bits_per_weight == (8 * (20 + 4) + 32 * 60) / 80  # one scale beside the codes
    assert Checkpoint(SPEC, INPUT, NAMES, floats).bits_per_weight == 32
