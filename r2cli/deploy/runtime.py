"""An ONNX file in ONNX Runtime: reading it, running it, and what the processor does with 8-bit integers."""

import json
import platform
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import onnx
import onnx.inliner
import onnxruntime as ort
import torch
from onnx import TensorProto
from torch import Tensor

from r2cli import data
from r2cli.deploy import weight_roles
from r2cli.errors import InputError
from r2cli.storage import checkpoint as checkpoints
from r2cli.storage.checkpoint import InputSpec

VERSION: str = ort.__version__
EXACT_PRODUCTS = "session.x64quantprecision"  # ONNX Runtime's session option; "1": no overflow without VNNI


class UnrunnableError(InputError):
    """ONNX Runtime does not load a file, or fails as it runs it."""


def read(path: Path) -> onnx.ModelProto:
    """The ONNX model at `path`, with its functions inlined. Raises InputError for a missing or corrupt one."""
    return inlined(opened(path))


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the bodies of its own functions in the place of their calls: r2 writes none, others do."""
    return onnx.inliner.inline_local_functions(model) if model.functions else model


def opened(path: Path) -> onnx.ModelProto:
    """The ONNX model at `path`, as it was written. Raises InputError for a missing or corrupt one."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: name an .onnx file, or make one with `r2 ptq`")
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf's and the checker's own classes share no base
        raise InputError(f"{path} is not a valid ONNX model ({type(error).__name__}): write it again") from error
    return model


def session(
    path: Path | bytes, *, optimise: bool = True, threads: int = 0, save_to: Path | None = None, exact: bool = True
) -> ort.InferenceSession:
    """A CPU session, in which weight-only MatMuls keep float activations: else ONNX Runtime rounds them to int8.

    On a processor without VNNI, ONNX Runtime's default kernels add two products of uint8 and int8 in 16 bits, which
    overflow. An `exact` session asks for the kernels that do not; on other processors it changes nothing.
    """
    options = ort.SessionOptions()
    if exact:
        options.add_session_config_entry(EXACT_PRODUCTS, "1")
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if save_to:
        options.optimized_model_filepath = str(save_to)
    try:
        return ort.InferenceSession(
            path if isinstance(path, bytes) else str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its exceptions have no common base but this
        what = "the file" if isinstance(path, bytes) else path
        raise UnrunnableError(f"{what} does not load in ONNX Runtime {ort.__version__}: {_first(error)}") from error


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def runner(path: Path, **options: Any) -> Callable[[Tensor], Tensor]:
    """A function from images (n, c, s, s) to logits (n, classes), by ONNX Runtime."""
    own = session(path, **options)
    name = own.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        try:
            return torch.from_numpy(own.run(None, {name: images.cpu().contiguous().numpy()})[0])
        except Exception as error:  # as above
            raise UnrunnableError(
                f"{path} fails when ONNX Runtime {ort.__version__} runs it: {_first(error)}"
            ) from error

    return run


def input_spec(path: Path) -> InputSpec:
    """The preprocessing that a file of ours records. Raises InputError for another tool's file."""
    return checkpoints.input_spec(_recorded(path, "r2.input"))


def data_name(path: Path) -> str:
    """The data set that the network in the file was trained on, as `data.load` knows it."""
    return data.named_in(_recorded(path, "r2.history"), str(path))


def class_names(path: Path) -> tuple[str, ...]:
    """The names of the classes, in the order of the logits."""
    return tuple(_recorded(path, "r2.class_names"))


def _recorded(path: Path, key: str) -> Any:
    entries = {entry.key: entry.value for entry in read(path).metadata_props}
    if key not in entries:
        raise InputError(f"{path} does not say how its images are preprocessed: only files written by r2 do")
    try:
        return json.loads(entries[key])
    except ValueError as error:
        raise InputError(f"{path} has damaged metadata '{key}' ({error}): write it again") from error


def latency_ms(run: Callable[[Tensor], Tensor], image: Tensor, repeats: int = 30) -> float:
    """Median time of `image`, a batch of one, in ms, after five runs to warm up."""
    times = []
    for _ in range(repeats + 5):
        start = perf_counter()
        run(image)
        times.append(1000 * (perf_counter() - start))
    return median(times[5:])


def node_counts(path: Path) -> dict[str, int]:
    """What ONNX Runtime runs at its default optimisation: how many nodes of each operator."""
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        session(path, save_to=optimised)
        return dict(sorted(Counter(node.op_type for node in onnx.load(optimised).graph.node).items()))


def _vnni() -> list[str]:
    """The processor's instructions that add products of 8-bit integers in 32 bits."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split())
    except (OSError, IndexError):
        flags = set()
    return sorted(flags & {"avx512_vnni", "avx_vnni", "amx_int8"})


def has_vnni() -> bool:
    """Whether products of 8-bit integers are added in 32 bits here, whatever a session's options: not on older x86."""
    return bool(_vnni()) or platform.machine().lower() not in ("x86_64", "amd64")


def cpu() -> str:
    """The processor and its integer dot-product instructions: without them uint8 x int8 sums may overflow."""
    return f"{platform.machine()} {' '.join(_vnni()) or 'without VNNI'}"


def run_constants(file: onnx.ModelProto, shapes: Mapping[str, Sequence[int] | None]) -> list[Any]:
    """The values of a file that come from constants alone, by ONNX Runtime without optimisation: arrays, in order.

    `shapes` names them; a shape may be None where it is not known. Raises InputError where ONNX Runtime cannot.
    """
    above = weight_roles.sources(file)
    needed = {value for name in shapes for value in (name, *above.get(name, []))}
    kinds = {info.name: info.type.tensor_type.elem_type for info in file.graph.value_info}
    part = onnx.ModelProto()
    part.CopyFrom(file)
    for field in ("node", "input", "output", "value_info"):
        part.graph.ClearField(field)
    part.graph.node.extend(node for node in file.graph.node if node.output[0] in needed)
    for name, shape in shapes.items():
        part.graph.output.append(onnx.helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), shape))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.onnx"
        onnx.save(part, path)
        own = session(path, optimise=False)
        try:
            found: list[Any] = own.run(list(shapes), {})
        except Exception as error:  # as above
            raise UnrunnableError(
                f"ONNX Runtime {ort.__version__} cannot decode the weights: {_first(error)}"
            ) from error
    return found


def values(file: onnx.ModelProto, names: Sequence[str], *, optimise: bool) -> Callable[[Tensor], dict[str, Tensor]]:
    """A function from images (n, ...) to the values of the inlined `file` by name: input, result, and `names`."""
    open_file = onnx.ModelProto()
    open_file.CopyFrom(file)
    open_file.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    own = session(open_file.SerializeToString(), optimise=optimise)
    outputs, given = [each.name for each in own.get_outputs()], own.get_inputs()[0].name

    def run(images: Tensor) -> dict[str, Tensor]:
        try:
            found = own.run(outputs, {given: images.cpu().contiguous().numpy()})
        except Exception as error:  # as above
            raise UnrunnableError(
                f"the file fails when ONNX Runtime {ort.__version__} runs it: {_first(error)}"
            ) from error
        read = zip(outputs, found, strict=True)
        return {given: images.cpu()} | {name: torch.from_numpy(value) for name, value in read}

    return run
