"""Inputs that once missed a goal, one a fault: each ended in an internal error, in all of the memory, or worse."""

import base64
import io
import json
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from mutations import NESTED, header_of_png, joined, json_text, split
from onnx import numpy_helper
from PIL import Image

Edit = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Case:
    """An edit of the valid file of a reader, which of its lines reads it, and a part of what r2 then says."""

    reader: str
    edit: Edit
    told: str
    line: int = 0
    code: int = 2


def _set(value: Any, path: str, new: Any) -> Any:
    """`value` with what stands at `path` (keys and numbers, with slashes; * is the first key) set to `new`."""
    key, _, rest = path.partition("/")
    key = next(iter(value)) if key == "*" else key
    own = dict(value) if isinstance(value, dict) else dict(enumerate(value))
    name: Any = key if isinstance(value, dict) else int(key)
    own[name] = _set(own[name], rest, new) if rest else new
    return own if isinstance(value, dict) else list(own.values())


def recorded(path: str, new: Any, key: str = "r2") -> Edit:
    """A value in the JSON of a safetensors file's metadata."""

    def edit(content: bytes) -> bytes:
        header, tensors = split(content)
        texts = header["__metadata__"]
        texts[key] = json_text(_set(json.loads(texts[key]), path, new))
        return joined(header, tensors)

    return edit


def header(path: str, new: Any) -> Edit:
    """A value in the header of a safetensors file."""

    def edit(content: bytes) -> bytes:
        table, tensors = split(content)
        return joined(_set(table, path, new), tensors)

    return edit


def renamed(old: str, new: str) -> Edit:
    def edit(content: bytes) -> bytes:
        table, tensors = split(content)
        return joined({(new if name == old else name): entry for name, entry in table.items()}, tensors)

    return edit


def in_json(path: str, new: Any) -> Edit:
    return lambda content: json_text(_set(json.loads(content), path, new)).encode()


def in_tokenizer(path: str, new: Any) -> Edit:
    def edit(content: bytes) -> bytes:
        table, _ = split(content)
        packed = json.loads(table["__metadata__"]["r2"])["input"]["tokenizer"]
        words = json.loads(zlib.decompress(base64.b64decode(packed)))
        changed = base64.b64encode(zlib.compress(json.dumps(_set(words, path, new)).encode())).decode()
        return recorded("input/tokenizer", changed)(content)

    return edit


def in_onnx(change: Callable[[onnx.ModelProto], None]) -> Edit:
    def edit(content: bytes) -> bytes:
        model = onnx.ModelProto.FromString(content)
        change(model)
        return bytes(model.SerializeToString())

    return edit


def valued(name: str, values: Any) -> Edit:
    """Other values of an initializer of integers."""

    def change(model: onnx.ModelProto) -> None:
        each = next(each for each in model.graph.initializer if each.name == name)
        each.CopyFrom(numpy_helper.from_array(torch.tensor(values).numpy(), name))

    return in_onnx(change)


def shaped(name: str, dims: list[int]) -> Edit:
    def change(model: onnx.ModelProto) -> None:
        next(each for each in model.graph.initializer if each.name == name).dims[:] = dims

    return in_onnx(change)


def noted(key: str, text: str) -> Edit:
    def change(model: onnx.ModelProto) -> None:
        next(each for each in model.metadata_props if each.key == key).value = text

    return in_onnx(change)


def in_pth(change: Callable[[dict[str, Any]], Any]) -> Edit:
    def edit(content: bytes) -> bytes:
        out = io.BytesIO()
        torch.save(change(dict(torch.load(io.BytesIO(content), weights_only=True)["state_dict"])), out)
        return out.getvalue()

    return edit


def _weight(change: Callable[[torch.Tensor], Any]) -> Edit:
    return in_pth(lambda state: {**state, "fc.weight": change(next(t for t in state.values() if t.ndim == 4))})


def _deep(state: dict[str, Any]) -> Any:
    deep: Any = state
    for _ in range(300):
        deep = {"model": deep}
    return deep


def _png(wide: int, high: int) -> Edit:
    def edit(content: bytes) -> bytes:
        out = io.BytesIO()
        Image.new("L", (wide, high)).save(out, "PNG")
        return out.getvalue()

    return edit


def text(old: str, new: str) -> Edit:
    return lambda content: content.replace(old.encode(), new.encode(), 1)


DAMAGED = "has damaged r2 metadata"


def _batch(count: int) -> Callable[[onnx.ModelProto], None]:
    def edit(model: onnx.ModelProto) -> None:
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = count

    return edit


def _grid_of_two(model: onnx.ModelProto) -> None:
    node = next(each for each in model.graph.node if each.op_type == "QuantizeLinear")
    held = next(each for each in model.graph.initializer if each.name == node.input[1])
    held.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(held).repeat(2), held.name))


def _grid_without_scale(model: onnx.ModelProto) -> None:
    last = [each for each in model.graph.node if each.op_type == "QuantizeLinear"][-1]
    model.graph.node.insert(0, onnx.helper.make_node("Identity", [last.input[1]], ["made"]))
    last.input[1] = "made"


def _of_type_99(model: onnx.ModelProto) -> None:
    next(each for each in model.graph.initializer if each.name == "rest").data_type = 99


def arrays(**changed: Any) -> Edit:
    """Other arrays in an .npz file."""

    def edit(content: bytes) -> bytes:
        with np.load(io.BytesIO(content)) as file:
            held = {name: file[name] for name in file.files} | changed
        made = io.BytesIO()
        np.savez(made, **held)
        return made.getvalue()

    return edit


def shape_of_array(content: bytes) -> bytes:
    """An .npz file with an array whose header says 400 GB."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file, file.open("x.npy", "w") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": (10**11,)})
    return made.getvalue()


CASES = {
    "a network is a list": Case("float", recorded("model", [1]), f"{DAMAGED} ('model' is a list, not a table)"),
    "a name is a number": Case("float", recorded("model/name", 3), "'model.name' is 3, not a text"),
    "classes are text": Case("float", recorded("model/classes", "ten"), "'model.classes' is 'ten', not an integer"),
    "classes without names": Case("float", recorded("model/classes", 1 << 20), "the network has 1048576 classes"),
    "a mean has another shape": Case("float", recorded("input/mean", [[0.5]]), "'input.mean.0' is a list"),
    "a mean for three channels": Case("float", recorded("input/mean", [0.5] * 3), "1 channels, 3 means"),
    "a deviation of zero": Case("float", recorded("input/std", [0.0]), "'input.std.0' is 0.0"),
    "a size of 2**31": Case("float", recorded("input/size", 2**31), "'input.size' is 2147483648"),
    "history is text": Case("float", recorded("history", "text"), "'history' is 'text', not a list"),
    "a network that no memory holds": Case(
        "float",
        recorded(
            "model",
            {"name": "vit_h_14", "classes": 10, "channels": 1, "stem": "small", "width": 1.0}
            | {"args": {"image_size": 1400}},
        ),
        "has more parameters than the file holds",
    ),
    "keywords that a factory divides by": Case(
        "float",
        recorded(
            "model",
            {"name": "vit_b_16", "classes": 10, "channels": 1, "stem": "small", "width": 1.0}
            | {"args": {"patch_size": 0}},
        ),
        "vit_b_16 cannot be made with",
    ),
    "a checkpoint's metadata is nested": Case("float", recorded("args", NESTED), "its JSON is nested too deeply"),
    "a palette's metadata is nested": Case("palette", recorded("codecs", NESTED), "its JSON is nested too deeply"),
    "bits are text": Case("coded", recorded("codecs/*/bits", "8"), ".bits' is '8', not an integer"),
    "bits are 2**70": Case("coded", recorded("codecs/*/bits", 2**70), "too many digits, not an integer"),
    "an axis that a weight lacks": Case("coded", recorded("codecs/*/axis", 5), "the weight has 2 axes"),
    "a shape of more codes": Case("coded", recorded("codecs/*/shape", [10**6, 10**6]), "not torch.uint8"),
    "a grid of a value that is not there": Case(
        "coded",
        recorded(
            "activations",
            {"gone": {"scale": 1.0, "zero_point": 0, "bits": 8, "signed": False} | {"odd": False, "axis": None}},
        ),
        "'gone' has no place in the graph",
    ),
    "a scale of an activation is text": Case(
        "coded", recorded("activations", {"a": {"scale": "x"}}), "'activations.a.scale' is 'x', not a number"
    ),
    "an axis of an activation": Case("coded", recorded("activations/*/axis", 1), ".axis' is 1, not null"),
    "a table of another shape": Case("palette", recorded("codecs/a.weight/bits", 8), "'a.weight.codes' is"),
    "an epoch with other keys": Case(
        "state", recorded("history", [{"a": 1}], "r2_resume"), "is damaged ('history.0.epoch' is missing)"
    ),
    "options are a list": Case("state", recorded("identity", [1], "r2_resume"), "'identity' is a list, not a table"),
    "a state without its generator": Case("state", renamed("rng", "other"), "the tensor 'rng' is missing"),
    "a state's metadata is nested": Case("state", recorded("history", NESTED, "r2_resume"), "nested too deeply"),
    "a report of text": Case("record", in_json("report/top1", []), "coded.manifest.json is damaged ('top1' is a list"),
    "a shard without a name": Case("shards", in_json("weight_map/b.bias", ""), "is missing"),
    "a shard of a very long name": Case("shards", in_json("weight_map/b.bias", "a" * 5000), "is missing"),
    "a shard of a name with escapes": Case("shards", in_json("weight_map/b.bias", "\x1b[31m"), "\\x1b[31m is missing"),
    "a header is nested": Case("weights", header("a.weight", NESTED), "its JSON is nested too deeply"),
    "a length of -1": Case("weights", header("a.weight/shape", [-48, -1]), "entry of 'a.weight' is damaged"),
    "a name with escapes": Case("weights", renamed("a.weight", "\x1b[31m\u202e.weight"), "\\x1b[31m\\u202e", 1, 0),
    "tokens outside the vocabulary": Case(
        "text", in_tokenizer("model/vocab/old", 9999), "its tokenizer gives the token 9999, its network knows"
    ),
    "a type of tokens beyond 32 bits": Case(
        "text",
        in_tokenizer("post_processor/pair/1/Sequence/type_id", 1 << 31),
        "the tokenizer in the file gives numbers above",
    ),
    "a type of tensors that nobody knows": Case("network", in_onnx(_of_type_99), "the tensor 'rest' is damaged", 1),
    "metadata nested, beside its checkpoint": Case(
        "onnx", noted("r2.history", "[" * 10**5 + "]" * 10**5), "same metadata", 3, 1
    ),
    "a network for batches of 10^9": Case("network", in_onnx(_batch(10**9)), "'images' of 1000000000x1x8x8 is too", 1),
    "a grid of two scales": Case("onnx", in_onnx(_grid_of_two), "failed its proof: runs", 3, 1),
    "a grid of a scale that is computed": Case(
        "onnx", in_onnx(_grid_without_scale), "failed its proof: manifest (", 3, 1
    ),
    "batches of a thousand million": Case("onnx", in_onnx(_batch(10**9)), "more than there is memory for", 3),
    "batches of a million": Case("onnx", in_onnx(_batch(10**6)), "it takes batches of 1,000,000 samples", 3, 1),
    "batches of a million, measured": Case("other-onnx", in_onnx(_batch(10**6)), "it takes batches of 1,000,000", 1),
    "an array of 400 GB": Case("npz", shape_of_array, "'x' holds other bytes than (100000000000,) of float32"),
    "arrays of other lengths": Case("npz", arrays(target=np.zeros(3)), "counts the same samples"),
    "pickled objects": Case("npz", arrays(x=np.array([{}] * 12)), "'x' holds pickled objects, which r2 never loads"),
    "a meta tensor": Case("pth", _weight(lambda w: w.to("meta")), "'fc.weight' is not a dense one of real numbers"),
    "a sparse tensor": Case("pth", _weight(lambda w: w.to_sparse()), "is not a dense one of real numbers"),
    "a complex tensor": Case("pth", _weight(lambda w: w.to(torch.complex64)), "is not a dense one of real numbers"),
    "a dict of 300 levels": Case("pth", in_pth(_deep), "holds no state_dict"),
    "zeros for more than the memory": Case("other-onnx", valued("tall", [1 << 40, 64]), "ONNX Runtime", line=1),
    "repeated beyond the memory": Case("other-onnx", valued("repeats", [1 << 36, 1]), "ONNX Runtime"),
    "indices outside": Case("other-onnx", valued("rows", [10**9] * 10), "ONNX Runtime", line=1, code=0),
    "data too short for its shape": Case("other-onnx", shaped("rows", [64]), "is not a valid ONNX model"),
    "no logits": Case("other-onnx", valued("tall", [10, 0]), "ONNX Runtime", line=1),
    "classes are a number": Case(
        "other-onnx", noted("r2.class_names", "3"), "damaged metadata ('class_names' is 3, not a list)", line=1
    ),
    "nested metadata of an ONNX file": Case(
        "other-onnx", noted("r2.history", "[" * 10**5 + "]" * 10**5), "its JSON is nested too deeply", line=1
    ),
    "a recipe's list of lists": Case("recipe", text("epochs = 1", "epochs = [[1]]"), "not a value that an option"),
    "a recipe's metrics are a list": Case("recipe", text('{ "top-1" = "top1" }', "[1]"), "'metrics' is a list"),
    "a recipe's matrix holds dates": Case("recipe", text("[8, 4]", "[1979-05-27]"), "bits in [matrix] wants"),
    "a recipe is nested": Case("recipe", text("[8, 4]", "[" * 3000 + "]" * 3000), "is not valid TOML"),
    "a recipe's number of 5,000 digits": Case("recipe", text("epochs = 1", f"epochs = {'9' * 5000}"), "is not valid"),
    "a recipe's name with a NUL": Case("recipe", text('"resnet8"', '"a\\u0000"'), "not a value that an option"),
    "results are nested": Case("results", in_json("x", NESTED), "done has the files", code=0),
    "an image of 1 x 5,000,000 pixels": Case("image", _png(1, 5_000_000), "cannot be decoded"),
    "an image of 13,000 x 13,000 pixels": Case("image", header_of_png(13_000, 13_000), "cannot be decoded"),
}
