"""Files of weights as streams of pieces: every dtype, shards, and everything that can be wrong with a file."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from r2cli.errors import InputError
from r2cli.storage import stream

DTYPES = [dtype for dtype in stream.DTYPES.values() if dtype != torch.bool]


def whole(stored: stream.Stored, piece: int) -> torch.Tensor:
    return torch.cat([part.clone() for part in stored.pieces(piece)]).reshape(stored.shape)


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_every_dtype_comes_back_bit_for_bit(piece: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    made = {
        str(dtype)[6:]: torch.randint(0, 256, (3, 5 * dtype.itemsize), generator=generator).to(torch.uint8).view(dtype)
        for dtype in DTYPES
    }
    save_file(made, tmp_path / "all.safetensors", {"by": "a test"})
    found = stream.tensors_of_file(tmp_path / "all.safetensors")
    assert {stored.name for stored in found} == set(made) and stream.metadata(tmp_path / "all.safetensors")
    for stored in found:
        read = whole(stored, piece)
        assert read.dtype == made[stored.name].dtype and stored.kind == stored.name
        assert torch.equal(read.view(torch.uint8), made[stored.name].view(torch.uint8))
    held = stream.from_memory("x", made["float32"].T, "memory")
    assert torch.equal(whole(held, piece).view(torch.uint8), made["float32"].T.contiguous().view(torch.uint8))


def test_empty_tensors_and_scalars(tmp_path: Path) -> None:
    save_file({"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.0)}, tmp_path / "x.safetensors")
    empty, scalar = sorted(stream.tensors_of_file(tmp_path / "x.safetensors"), key=lambda stored: stored.name)
    assert empty.size == 0 and list(empty.pieces()) == []
    assert scalar.shape == () and scalar.size == 1 and float(next(scalar.pieces())) == 2.0


def test_a_type_that_torch_has_not_is_named_and_not_read(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F4", "shape": [2, 2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0")
    (stored,) = stream.tensors_of_file(tmp_path / "x.safetensors")
    assert stored.dtype is None and stored.kind == "F4"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model in two shards, as transformers writes it; the path of its index."""
    folder = tmp_path / "model"
    folder.mkdir()
    parts = {"a.10.weight": torch.ones(2, 2), "a.9.weight": torch.zeros(3)}, {"b": torch.full((4, 1), 2.0)}
    places: dict[str, str] = {}
    for number, part in enumerate(parts):
        file = f"model-{number}.safetensors"
        save_file(part, folder / file)
        places |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 44}, "weight_map": places}))
    return index


def test_shards_are_one_model_by_index_or_directory(sharded: Path) -> None:
    for path in (sharded, sharded.parent):
        found = stream.tensors_of_model(path)
        assert [stored.name for stored in found] == ["a.9.weight", "a.10.weight", "b"]
        assert whole(found[2], 3).tolist() == [[2.0]] * 4
    assert [stored.name for stored in stream.tensors_of_model(sharded.with_name("model-1.safetensors"))] == ["b"]


def test_a_directory_with_one_file_is_that_file(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "only.safetensors")
    assert stream.tensors_of_model(tmp_path)[0].file == str(tmp_path / "only.safetensors")


def test_what_is_wrong_with_shards(sharded: Path) -> None:
    (sharded.parent / "model-1.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-1.safetensors is missing: .* 'b'"):
        stream.tensors_of_model(sharded)
    save_file({"c": torch.ones(1)}, sharded.parent / "model-1.safetensors")
    with pytest.raises(InputError, match=r"model-1.safetensors lacks the tensor 'b'"):
        stream.tensors_of_model(sharded)
    for text in ("[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        sharded.write_text(text)
        with pytest.raises(InputError, match="is not an index"):
            stream.tensors_of_model(sharded)
    sharded.unlink()
    with pytest.raises(InputError, match="a directory with 2 models"):
        stream.tensors_of_model(sharded.parent)


def test_an_index_names_only_files_beside_it(sharded: Path) -> None:
    outside = sharded.parent.parent / "secret.safetensors"
    save_file({"a": torch.ones(1)}, outside)
    sharded.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(InputError, match="is missing"):
        stream.tensors_of_model(sharded)


def _file(header: object, body: bytes = b"\0" * 16) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
DAMAGED = {
    "empty file": (b"", "not a safetensors file"),
    "text": (b"hello, I am a text that is long enough", "not a safetensors file"),
    "header cut off": (_file({"w": ENTRY})[:30], "not a safetensors file, or its header is cut off"),
    "header is no JSON": (_file(b"{nope}"), "its header: it is not JSON"),
    "header is no UTF-8": (_file(b"\xff\xfe{}"), "its header: "),
    "header is a list": (_file([1]), "it is a list, not a table"),
    "body cut off": (_file({"w": ENTRY}, b"\0" * 9), "ends inside the tensor 'w'"),
    "offsets backwards": (_file({"w": {**ENTRY, "data_offsets": [16, 0]}}), "entry of 'w' is damaged"),
    "negative shape": (_file({"w": {**ENTRY, "shape": [-2, -2]}}), "entry of 'w' is damaged"),
    "shape of words": (_file({"w": {**ENTRY, "shape": ["2"]}}), "entry of 'w' is damaged"),
    "too few bytes": (_file({"w": {**ENTRY, "data_offsets": [0, 12]}}), "entry of 'w' is damaged"),
    "three offsets": (_file({"w": {**ENTRY, "data_offsets": [0, 1, 2]}}), "entry of 'w' is damaged"),
    "no dtype": (_file({"w": {"shape": [2]}}), "entry of 'w' is damaged"),
    "entry is a number": (_file({"w": 3}), "entry of 'w' is damaged"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_one_sentence_with_its_name(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        stream.tensors_of_model(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_files_and_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="does not exist"):
        stream.tensors_of_model(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match=r"directory without a \.safetensors file"):
        stream.tensors_of_model(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(_file({"w": ENTRY}))

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(InputError, match=r"x\.safetensors cannot be read: Permission denied"):
        stream.tensors_of_model(tmp_path / "x.safetensors")


def test_a_file_that_shrinks_or_fails_while_it_is_read_names_the_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(_file({"w": ENTRY}))
    (stored,) = stream.tensors_of_file(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="ends inside the tensor 'w'"):
        whole(stored, 4)

    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(InputError, match=r"tensor 'w' cannot be read \(Input/output error\)"):
        whole(stored, 4)
