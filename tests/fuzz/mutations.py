"""Mutations of valid files: of their bytes, and of their structure, so that a reader gets past its first check.

`mutated(content, name, draw)` gives other bytes for the content of a file of that name; `draw` decides everything.
"""

import base64
import io
import json
import random
import re
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

HUGE = (2**31, 2**63 - 1, 2**64, 10**12, 10**400, -1, 0, 1, 7, 255, 65536)
# Names that are told: escape sequences, a right-to-left mark, a lone surrogate, markup, a very long one, a path.
NAMES = ("\x1b]0;owned\x07\x1b[31m", "\u202eevil", "\ud800", "[bold]</script><b>", "a" * 5000, "../../etc/passwd", "")
CODE = ("evil.py:factory", "evil:factory", "text:evil", "timm:evil", "os:system")


def mutated(content: bytes, name: str, draw: random.Random) -> bytes:
    """`content` of a file of `name`, changed in one to three places."""
    structured = STRUCTURED.get(name.rpartition(".")[2])
    if structured is None or draw.random() < 0.25:
        return _bytes(content, draw)
    try:
        return structured(content, draw)
    except (ValueError, TypeError, KeyError, RecursionError):  # a second change of what the first made unreadable
        return _bytes(content, draw)


def _bytes(content: bytes, draw: random.Random) -> bytes:
    """Bits flipped, a piece cut off, removed, repeated or overwritten."""
    out = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(min(len(out), draw.choice((64, 4096, 1 << 30)))) if out else 0
        length = draw.choice((1, 2, 4, 8, 64))
        kind = draw.randrange(6)
        if kind == 0 and out:
            out[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del out[at:]
        elif kind == 2:
            del out[at : at + length]
        elif kind == 3:
            out[at:at] = out[at : at + length] * draw.choice((1, 100))
        elif kind == 4:
            out[at : at + length] = draw.choice((b"\0", b"\xff", b"\x7f")) * length
        else:
            out[at : at + length] = draw.randbytes(length)
    return bytes(out)


# --- JSON -----------------------------------------------------------------------------------------------------------


def json_value(value: Any, draw: random.Random) -> Any:
    """`value` with one place in it changed: another type, an absurd number, a key dropped or added, deep nesting."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(list(value))
        kind = draw.random()
        if kind < 0.12:
            return {own: each for own, each in value.items() if own != key}
        if kind < 0.2:
            return {(draw.choice(NAMES) if own == key else own): each for own, each in value.items()}
        return {**value, key: json_value(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.7:
        at = draw.randrange(len(value))
        kind = draw.random()
        if kind < 0.15:
            return value[:at] + value[at + 1 :]
        if kind < 0.25:
            return value + value[at:]
        return [*value[:at], json_value(value[at], draw), *value[at + 1 :]]
    if isinstance(value, str) and draw.random() < 0.4:
        return draw.choice((*NAMES, *CODE, value + draw.choice(NAMES), "nan", "1e400"))
    if isinstance(value, int | float) and not isinstance(value, bool) and draw.random() < 0.6:
        return draw.choice((*HUGE, 0.5, float("nan"), float("inf"), -1e308, 1e-320, not value))
    return draw.choice((None, True, 0, -1, 2**70, 1.5, "text", [], {}, [[]], {"a": 1}, [value], {"": value}, NESTED))


class _Nested:
    """Stands for JSON that is nested until a reader's recursion ends."""


NESTED = _Nested()
_MARK = '"\\u0000nested"'


def json_text(value: Any) -> str:
    """`value` as JSON; the class of a number that JSON lacks is written as Python does."""
    text = json.dumps(value, default=lambda _: "\0nested")
    return text.replace(_MARK, "[" * 100_000 + "]" * 100_000)


def _changed(value: Any, draw: random.Random) -> Any:
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        value = json_value(value, draw)
    return value


def _json(content: bytes, draw: random.Random) -> bytes:
    return json_text(_changed(json.loads(content), draw)).encode(errors="surrogatepass")


# --- safetensors ----------------------------------------------------------------------------------------------------


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and its tensors' bytes."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: Any, tensors: bytes) -> bytes:
    text = json_text(header).encode(errors="surrogatepass")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + tensors


def _safetensors(content: bytes, draw: random.Random) -> bytes:
    header, tensors = split(content)
    recorded = header.get("__metadata__", {})
    kind = draw.random()
    if recorded and kind < 0.55:
        key = draw.choice(list(recorded))
        inner = json.loads(recorded[key])
        packed = inner.get("input", {}).get("tokenizer") if isinstance(inner.get("input"), dict) else None
        if packed and draw.random() < 0.6:
            words = json.loads(zlib.decompress(base64.b64decode(packed)))
            other = json_text(_changed(words, draw)).encode(errors="replace")
            inner["input"]["tokenizer"] = base64.b64encode(zlib.compress(other)).decode()
        else:
            inner = _changed(inner, draw)
        header["__metadata__"][key] = json_text(inner)
    elif kind < 0.7:
        header = _changed(header, draw)
    elif kind < 0.85:
        header = _retyped(header, draw)
    else:
        header, tensors = _revalued(header, tensors, draw)
    return joined(header, tensors)


def _retyped(header: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """Another dtype or shape of the same number of bytes, two tensors exchanged, or another name."""
    names = [name for name in header if name != "__metadata__"]
    name = draw.choice(names)
    entry = dict(header[name])
    size = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
    length = entry["data_offsets"][1] - entry["data_offsets"][0]
    kind = draw.randrange(4)
    if kind == 0:
        fits = [dtype for dtype, width in size.items() if length % width == 0]
        entry["dtype"] = draw.choice([*fits, "F8_E4M3", "F4", "C64"])
        entry["shape"] = [length // size.get(entry["dtype"], 1)]
    elif kind == 1:
        entry["shape"] = draw.choice(([*entry["shape"], 1], [1, *entry["shape"]], entry["shape"][::-1]))
    elif kind == 2:
        other = draw.choice(names)
        return {**header, name: header[other], other: header[name]}
    else:
        return {(name + draw.choice(NAMES) if own == name else own): each for own, each in header.items()}
    return {**header, name: entry}


def _revalued(header: dict[str, Any], tensors: bytes, draw: random.Random) -> tuple[dict[str, Any], bytes]:
    """NaN, infinity, zeros or noise in the bytes of one tensor."""
    name = draw.choice([name for name in header if name != "__metadata__"])
    start, stop = header[name]["data_offsets"]
    fill = draw.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\0\0", b"\xff\xff\xff\xff"))
    width = stop - start if draw.random() < 0.5 else min(4, stop - start)
    return header, tensors[:start] + (fill * (width // 4 + 1))[:width] + tensors[start + width :]


# --- others ---------------------------------------------------------------------------------------------------------


def _toml(content: bytes, draw: random.Random) -> bytes:
    """One value of a recipe replaced by one of another kind."""
    text = content.decode()
    places = list(re.finditer(r"(?<== ).+$", text, re.MULTILINE))
    for _ in range(draw.randint(1, 2)):
        place = draw.choice(places)
        other = draw.choice(
            ("[]", "{}", "[[1]]", "[{}]", "{ a = 1 }", "1e400", "nan", "9" * 30, "true", '""', '"{bits}{reg.x}"')
            + ('"{reg.name}"', "1979-05-27", '"\\u001b[31m"', '["a", 1]', "[" * 2000 + "]" * 2000, '"a\\u0000b"')
            + ('"--help"', '"{bits.x}"', "[false]", "-1", "inf", '"../../x"', '"{}"', '"{nothing}"')
        )
        text = text.replace(place[0], other, 1)
    if draw.random() < 0.3:
        lines = text.splitlines()
        del lines[draw.randrange(len(lines))]
        text = "\n".join(lines)
    return text.encode()


def _onnx(content: bytes, draw: random.Random) -> bytes:
    """Attributes, shapes, values, names and metadata of an ONNX file changed."""
    model = onnx.ModelProto.FromString(content)
    for _ in range(draw.choice((1, 1, 2))):
        draw.choice((_onnx_value, _onnx_value, _onnx_node, _onnx_shape, _onnx_recorded, _onnx_name))(model, draw)
    return bytes(model.SerializeToString())


def _onnx_value(model: onnx.ModelProto, draw: random.Random) -> None:
    small = [each for each in model.graph.initializer if each.data_type in (7, 6)] or list(model.graph.initializer)
    each = draw.choice(small if draw.random() < 0.8 else list(model.graph.initializer))
    array = numpy_helper.to_array(each).copy()
    kind = draw.randrange(3)
    if kind == 0 and array.size:
        value = draw.choice((0, -1, 3, 2**31 - 1, 10**9, 10**6, 127, -128))
        array.flat[draw.randrange(array.size)] = value if array.dtype.itemsize >= 4 else value % 127
        each.CopyFrom(numpy_helper.from_array(array, each.name))
    elif kind == 1:
        each.dims[:] = draw.choice(([*each.dims, 1], [2**40], [-1], [], [0], list(each.dims)[::-1]))
    else:
        each.data_type = draw.choice((1, 2, 3, 6, 7, 8, 9, 10, 11, 16, 22, 99))


def _onnx_node(model: onnx.ModelProto, draw: random.Random) -> None:
    node = draw.choice(list(model.graph.node))
    kind = draw.randrange(5)
    if kind == 0 and node.input:
        node.input[draw.randrange(len(node.input))] = draw.choice(
            ("", "missing", *(n.output[0] for n in model.graph.node))
        )
    elif kind == 1:
        node.op_type = draw.choice(
            ("Tile", "Range", "ConstantOfShape", "Expand", "Conv", "Loop", "Resize", "Einsum", "X")
        )
    elif kind == 2 and node.attribute:
        each = draw.choice(list(node.attribute))
        if each.type == onnx.AttributeProto.INTS:
            each.ints[:] = draw.choice(([2**31], [0], [-1, -1, -1, -1], [1000000] * 4, []))
        else:
            each.i = draw.choice((2**40, -5, 0, 10**6))
    elif kind == 3:
        model.graph.node.remove(node)
    else:
        node.domain = draw.choice(("com.microsoft", "evil", ""))


def _onnx_shape(model: onnx.ModelProto, draw: random.Random) -> None:
    shape = draw.choice([*model.graph.input, *model.graph.output]).type.tensor_type
    if draw.random() < 0.3:
        shape.elem_type = draw.choice((1, 6, 7, 8, 9, 10))
    elif shape.shape.dim:
        draw.choice(list(shape.shape.dim)).dim_value = draw.choice((1, 3, 0, -1, 10**9))
    else:
        shape.shape.dim.add().dim_value = 3


def _onnx_recorded(model: onnx.ModelProto, draw: random.Random) -> None:
    if model.metadata_props:
        each = draw.choice(list(model.metadata_props))
        each.value = json_text(_changed(json.loads(each.value), draw)) if each.value[:1] in "[{" else "x"
        each.value = each.value.encode(errors="replace").decode()


def _onnx_name(model: onnx.ModelProto, draw: random.Random) -> None:
    each = draw.choice(list(model.graph.initializer))
    other = draw.choice([name for name in NAMES if name.isprintable() or "\ud800" not in name])
    for node in model.graph.node:
        for at, name in enumerate(node.input):
            if name == each.name:
                node.input[at] = other
    each.name = other


class _Evil:
    """Its pickle writes a file when it is read by a reader that runs code."""

    def __reduce__(self) -> Any:
        return (exec, ("open('PWNED', 'w').close()",))


def _pth(content: bytes, draw: random.Random) -> bytes:
    """Another structure, or other kinds of tensors."""
    read = torch.load(io.BytesIO(content), weights_only=True)
    state = dict(read["state_dict"])
    name = draw.choice(list(state))
    tensor = state[name]
    deep: Any = state
    for _ in range(draw.choice((3, 400))):
        deep = {"model": deep}
    of_weights: Any = draw.choice(
        (
            lambda: tensor.to_sparse() if tensor.ndim else tensor,
            lambda: tensor.to("meta"),
            lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
            lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            lambda: tensor.to(draw.choice((torch.complex64, torch.bool, torch.int64, torch.float8_e4m3fn))),
            lambda: tensor * float("nan"),
            lambda: tensor.expand(10**6, *tensor.shape),
            lambda: tensor.reshape(-1),
            lambda: draw.choice((None, "text", 3, [tensor], {"a": tensor}, torch.Size([1]))),
            lambda: _Evil(),
            lambda: torch.nn.Parameter(tensor.float(), requires_grad=True),
        )
    )
    made = draw.choice(
        (
            lambda: {**state, name: of_weights()},
            lambda: {"state_dict": {**state, name: of_weights()}},
            lambda: {name + draw.choice(NAMES): state.pop(name), **state},
            lambda: deep,
            lambda: {"model": state, "ema": {**state, name: of_weights()}},
            lambda: {0: state, ("a", 1): 2},
            lambda: [state],
            lambda: {**state, 7: tensor, None: tensor},
            lambda: {"state_dict": "text"},
            dict,
        )
    )()
    out = io.BytesIO()
    try:
        torch.save(made, out)
    except Exception:  # not every tensor can be saved
        return _bytes(content, draw)
    return out.getvalue()


def _image(content: bytes, draw: random.Random) -> bytes:
    """An image of an absurd size: a PNG or BMP whose header says so, or one that is very long and 1 pixel wide."""
    from PIL import Image

    wide, high = draw.choice(((1, 60_000), (60_000, 1), (13_000, 13_000), (2**31 - 1, 1), (9_000, 9_000), (12, 12)))
    if content[:2] == b"BM":
        out = bytearray(content)
        out[18:22], out[22:26] = (n.to_bytes(4, "little") for n in (wide, high))
        if draw.random() < 0.3:
            out[28] = draw.choice((1, 4, 8, 16, 32))
        return bytes(out)
    if wide * high <= 60_000 and draw.random() < 0.7:
        stored = io.BytesIO()
        Image.new(draw.choice(("L", "RGB", "RGBA", "P", "I;16", "1")), (wide, high)).save(stored, "PNG")
        return stored.getvalue()
    return header_of_png(wide, high)(content)


def header_of_png(wide: int, high: int) -> Callable[[bytes], bytes]:
    """The content of a PNG file with another size in its header."""

    def edit(content: bytes) -> bytes:
        head = b"IHDR" + wide.to_bytes(4, "big") + high.to_bytes(4, "big") + content[24:29]
        return content[:12] + head + zlib.crc32(head).to_bytes(4, "big") + content[33:]

    return edit


# --- arrays ---------------------------------------------------------------------------------------------------------


def _npz(content: bytes, draw: random.Random) -> bytes:
    """One array of another name, type, shape or header, in an archive that is whole."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        arrays = {name: file.read(name) for name in file.namelist()}
    name = draw.choice(list(arrays))
    kind = draw.randrange(6)
    if kind == 0:
        arrays[f"{draw.choice(NAMES)}.npy"] = arrays.pop(name)
    elif kind == 1:
        arrays[name] = _bytes(arrays[name], draw)
    elif kind == 2:
        arrays.pop(name)
    elif kind == 3:  # a header of the same length that says something else
        shape = draw.choice(("(99999999999,)", "(-1, 6)", "(12, 6, 9)", "((((", "(1e9,)", "(2**40,)", "()"))
        header = arrays[name][10 : 10 + int.from_bytes(arrays[name][8:10], "little")].decode("latin1")
        said = re.sub(r"\([^)]*\)", lambda _: shape, header, count=1).rstrip()[: len(header) - 1].ljust(len(header) - 1)
        arrays[name] = arrays[name][:10] + f"{said}\n".encode() + arrays[name][10 + len(header) :]
    else:
        values = np.load(io.BytesIO(arrays[name]), allow_pickle=False)
        other = io.BytesIO()
        dtype = draw.choice(("O", "U4", "c8", "?", "i1", "f2", "f8", "M8[s]", "V3"))
        sides = draw.choice((values.shape, (values.size,), (*values.shape, 1), (1, *values.shape)))
        np.save(other, values.astype(dtype).reshape(sides) if dtype != "V3" else np.zeros(sides, "V3"))
        arrays[name] = other.getvalue()
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as file:
        for name, data in arrays.items():
            file.writestr(name, data)
    return made.getvalue()


def _tsv(content: bytes, draw: random.Random) -> bytes:
    lines = content.decode().splitlines()
    at = draw.randrange(len(lines)) if draw.random() < 0.6 else 0
    cells = lines[at].split("\t")
    cells[draw.randrange(len(cells))] = draw.choice((*NAMES[:2], *NAMES[3:], "\0", "é" * 9000, "label", "\t", '"'))
    lines[at] = "\t".join(cells)
    return ("\n".join(lines[: draw.choice((1, 2, 99))]) + "\n").encode()


STRUCTURED = {
    "safetensors": _safetensors,
    "json": _json,
    "toml": _toml,
    "onnx": _onnx,
    "pth": _pth,
    "png": _image,
    "bmp": _image,
    "tsv": _tsv,
    "npz": _npz,
}
