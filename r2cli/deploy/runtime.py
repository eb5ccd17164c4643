"""An ONNX file in ONNX Runtime: reading it, running it, and what the processor does with 8-bit integers."""

import json
import math
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnxruntime as ort
import torch
from onnx import TensorProto
from packaging.version import Version
from torch import Tensor

from r2cli import data
from r2cli.config import machine
from r2cli.config.targets import TARGETS
from r2cli.deploy import external_data, weight_roles
from r2cli.errors import InputError
from r2cli.storage import checkpoint as checkpoints
from r2cli.storage import schema
from r2cli.storage.atomic import scratch_folder
from r2cli.storage.formats import OnnxEntry
from r2cli.storage.input_spec import Given, NetworkInput, places
from r2cli.storage.schema import Malformed

VERSION: str = ort.__version__
MOST_BATCH = 2**14  # samples that a file fixes, where fewer are given
EXACT_PRODUCTS = "session.x64quantprecision"  # ONNX Runtime's session option; "1": no overflow without VNNI


class UnrunnableError(InputError):
    """ONNX Runtime does not load a file, or fails as it runs it."""


class UnloadableError(UnrunnableError):
    """Another runtime does not load a file."""


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
        model = external_data.load(path)
        # The checker lets data pass that is too short for its shape.
        for each in weight_roles.constants(model).values():
            onnx.numpy_helper.to_array(each)
        _require_room(model, path)
    except InputError:
        raise
    except Exception as error:  # protobuf's and the checker's own classes share no base
        why = _first(error) if isinstance(error, onnx.checker.ValidationError) else type(error).__name__
        raise InputError(f"{path} is not a valid ONNX model ({why.rstrip('.')}): write it again") from error
    return model


def _require_room(model: onnx.ModelProto, path: Path) -> None:
    """Raises InputError for an input that the file fixes at a size that nobody has the memory for."""
    for each in model.graph.input:
        sizes = [max(one.dim_value, 1) for one in each.type.tensor_type.shape.dim]
        if math.prod(sizes) * 8 > memory() // 4:  # bytes; it is copied, and the network makes values of it
            told = "x".join(map(str, sizes))
            raise InputError(f"{path} wants '{each.name}' of {told}, more than there is memory for: write it for less")


def session(
    path: Path | bytes,
    *,
    optimise: bool = True,
    threads: int = 0,
    save_to: Path | None = None,
    exact: bool = True,
    profile_to: Path | None = None,
) -> ort.InferenceSession:
    """A CPU session, in which weight-only MatMuls keep float activations: else ONNX Runtime rounds them to int8.

    On a processor without VNNI, ONNX Runtime's default kernels add two products of uint8 and int8 in 16 bits, which
    overflow. An `exact` session asks for the kernels that do not; on other processors it changes nothing.
    """
    _bound_memory()
    options = ort.SessionOptions()
    options.add_session_config_entry("session.use_env_allocators", "1")
    if exact and not _aborts(path):
        options.add_session_config_entry(EXACT_PRODUCTS, "1")
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if save_to:
        options.optimized_model_filepath = str(save_to)
    if profile_to:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_to)
    try:
        return ort.InferenceSession(
            path if isinstance(path, bytes) else str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its exceptions have no common base but this
        what = "the file" if isinstance(path, bytes) else path
        raise UnrunnableError(f"{what} does not load in ONNX Runtime {ort.__version__}: {_first(error)}") from error


def _aborts(path: Path | bytes) -> bool:
    """Whether an exact session would end the process: before ONNX Runtime 1.30, where 8-bit codes have no zero point.
    Files of ours have one.
    """
    if Version(VERSION) >= Version("1.30"):
        return False
    model = onnx.load_from_string(path) if isinstance(path, bytes) else onnx.load(path, load_external_data=False)
    wide = {each.name for each in model.graph.initializer if each.data_type == TensorProto.INT32}
    decodes = (node.input for node in model.graph.node if node.op_type == "DequantizeLinear")
    return any(len(given) < 3 and given[0] not in wide for given in decodes)


@cache
def _bound_memory() -> None:
    """Let sessions of this process take three quarters of its memory at most, and refuse what a file asks beyond."""
    info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(info, ort.OrtArenaCfg({"max_mem": memory() * 3 // 4}))


def memory() -> int:
    """Bytes of memory for this process: free in the machine, of its control group, or left of its address space."""
    found = []
    with suppress(AttributeError, ValueError):  # Windows
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, IndexError):  # no Linux; what others use is not free
        found.append(1024 * int(_told_by("/proc/meminfo").split("MemAvailable:")[1].split()[0]))
    with suppress(OSError, ValueError):  # no Linux, or no limit
        found.append(int(_told_by("/sys/fs/cgroup/memory.max")))
    with suppress(ImportError, OSError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        used = int(_told_by("/proc/self/statm").split()[0]) * resource.getpagesize()
        found += [max(0, limit - used)] if limit != resource.RLIM_INFINITY else []
    return min(found, default=UNBOUNDED)


UNBOUNDED = 1 << 40  # bytes, where the system does not say


def _told_by(file: str) -> str:
    """What Linux writes in one of its own files."""
    return Path(file).read_text(encoding="utf-8")


def _first(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "it takes more memory than there is"
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def runner(path: Path, **options: Any) -> Callable[..., Any]:
    """A function from inputs by place to the outputs, one tensor or a tuple, by ONNX Runtime."""
    own = session(path, **options)
    given = own.get_inputs()

    def run(*inputs: Tensor) -> Given:
        try:
            found = _in_batches(own, None, given, inputs)
        except Exception as error:  # as above
            raise UnrunnableError(
                f"{path} fails when ONNX Runtime {ort.__version__} runs it: {_first(error)}"
            ) from error
        outputs = tuple(map(torch.from_numpy, found))
        for one in outputs:
            if not one.ndim or one.shape[0] != len(inputs[0]) or not one.numel():
                raise UnrunnableError(
                    f"{path} gives {tuple(one.shape)} for a batch of {len(inputs[0])}: outputs have the batch first"
                )
        return outputs if len(outputs) > 1 else outputs[0]

    return run


def fed(names: Sequence[str], inputs: Sequence[Tensor]) -> dict[str, Any]:
    """What a session is given: arrays by the names of its inputs."""
    return {name: one.cpu().contiguous().numpy() for name, one in zip(names, inputs, strict=True)}


@dataclass(frozen=True)
class Recorded:
    """What a file of ours records: its preprocessing, its classes in the order of the logits, and its data set."""

    input: NetworkInput
    class_names: tuple[str, ...]
    data: str
    outputs: tuple[str, ...]
    history: tuple[Mapping[str, Any], ...] = ()


def is_ours(path: Path) -> bool:
    """Whether the file at `path` records anything that r2 does. Raises InputError as `opened` does."""
    return any(entry.key.startswith("r2.") for entry in opened(path).metadata_props)


def recorded(path: Path) -> Recorded:
    """What the file at `path` records. Raises InputError for another tool's file, and for damaged metadata."""
    return of_metadata({entry.key: entry.value for entry in opened(path).metadata_props}, path)


def of_metadata(found: Mapping[str, str], path: Path) -> Recorded:
    """What the metadata `found` in the file at `path` says. Raises InputError as `recorded` does."""
    if not {f"r2.{own.name}" for own in fields(OnnxEntry) if own.default is MISSING} <= found.keys():
        raise InputError(f"{path} does not say how its images are preprocessed: only files written by r2 do")
    try:
        entry = schema.read(
            OnnxEntry,
            {own.name: schema.parsed(found[key]) for own in fields(OnnxEntry) if (key := f"r2.{own.name}") in found},
        )
        spec = checkpoints.input_spec(entry.input)
    except Malformed as error:
        raise InputError(f"{path} has damaged metadata ({error}): write it again") from error
    named = data.named_in(entry.history, str(path))
    return Recorded(spec, entry.class_names, named, entry.outputs, entry.history)


def filled(given: Mapping[str, Any], samples: int, size: int) -> Iterator[dict[str, Any]]:
    """Yield arrays (`samples`, ...) in batches of `size`, the last one filled up with the last sample.

    Raises UnrunnableError for batches of so many samples that nearly all of them would be that one.
    """
    if size > max(samples, MOST_BATCH):
        raise UnrunnableError(f"it takes batches of {size:,} samples, and {samples:,} are there: write it for fewer")
    for start in range(0, samples, size):
        yield {name: one.take(range(start, start + size), 0, mode="clip") for name, one in given.items()}


def _in_batches(
    own: ort.InferenceSession, outputs: Sequence[str] | None, given: Sequence[Any], inputs: Sequence[Tensor]
) -> list[Any]:
    """The outputs for `inputs` (n, ...), in the batches that a file of a fixed batch takes, the last one filled up."""
    fed_all = fed([each.name for each in given], inputs)
    size, samples = given[0].shape[0] if given[0].shape else None, len(inputs[0])
    if not isinstance(size, int) or size == samples:
        found: list[Any] = own.run(outputs, fed_all)
        return found
    runs = [own.run(outputs, part) for part in filled(fed_all, samples, size)]
    return [np.concatenate(parts)[:samples] for parts in zip(*runs, strict=True)]


def target_of(model: onnx.ModelProto) -> str | None:
    """The target that a file of ours says it is for; None for another file."""
    told = {entry.value for entry in model.metadata_props if entry.key == "r2.target"}
    return next((name for name in TARGETS if json.dumps(name) in told), None)


def latency_ms(run: Callable[..., object], one: Given, repeats: int = 30) -> float:
    """Median time of `one`, a batch of one sample, in ms, after five runs to warm up."""
    times = []
    for _ in range(repeats + 5):
        start = perf_counter()
        run(*places(one))
        times.append(1000 * (perf_counter() - start))
    return median(times[5:])


def node_counts(path: Path, *, exact: bool = True) -> dict[str, int]:
    """What ONNX Runtime runs at its default optimisation: how many nodes of each operator."""
    with scratch_folder() as folder:
        optimised = folder / "optimised.onnx"
        session(path, save_to=optimised, exact=exact)
        return dict(
            sorted(Counter(node.op_type for node in onnx.load(optimised, load_external_data=False).graph.node).items())
        )


def operator_times(path: Path, given: Mapping[str, Any], runs: int = 5) -> dict[str, float]:
    """Percent of the time that ONNX Runtime's nodes of each operator take on one thread, the most first."""
    taken: Counter[str] = Counter()
    for run in node_times(path, given, runs):
        for operator, time in run:
            taken[operator] += round(time)
    total = sum(taken.values()) or 1
    return {operator: 100 * time / total for operator, time in taken.most_common()}


def node_times(path: Path, given: Mapping[str, Any], runs: int) -> list[list[tuple[str, float]]]:
    """The operator and the microseconds of every node of ONNX Runtime's, on one thread, for every run."""
    with scratch_folder() as folder:
        own = session(path, threads=1, profile_to=folder / "times")
        for _ in range(runs):
            own.run(None, dict(given))
        events = json.loads(Path(own.end_profiling()).read_text(encoding="utf-8"))
    taken = [
        (event["args"]["op_name"], float(event["dur"]))
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    ]
    size = len(taken) // runs
    return [taken[place : place + size] for place in range(0, size * runs, size or 1)]


def _vnni() -> list[str]:
    """The processor's instructions that add products of 8-bit integers in 32 bits."""
    return sorted(machine.processor_flags() & {"avx512_vnni", "avx_vnni", "amx_int8"})


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
    with scratch_folder() as folder:
        path = folder / "weights.onnx"
        onnx.save(part, path)
        own = session(path, optimise=False)
        try:
            found: list[Any] = own.run(list(shapes), {})
        except Exception as error:  # as above
            raise UnrunnableError(
                f"ONNX Runtime {ort.__version__} cannot decode the weights: {_first(error)}"
            ) from error
    return found


def values(file: onnx.ModelProto, names: Sequence[str], *, optimise: bool) -> Callable[..., dict[str, Tensor]]:
    """A function from inputs by place to the values of the inlined `file` by name: inputs, results, and `names`."""
    open_file = onnx.ModelProto()
    open_file.CopyFrom(file)
    open_file.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    own = session(open_file.SerializeToString(), optimise=optimise)
    outputs, given = [each.name for each in own.get_outputs()], own.get_inputs()

    def run(*inputs: Tensor) -> dict[str, Tensor]:
        try:
            found = _in_batches(own, outputs, given, inputs)
        except Exception as error:  # as above
            raise UnrunnableError(
                f"the file fails when ONNX Runtime {ort.__version__} runs it: {_first(error)}"
            ) from error
        read = zip(outputs, found, strict=True)
        own_inputs = {place.name: one.cpu() for place, one in zip(given, inputs, strict=True)}
        return own_inputs | {name: torch.from_numpy(value) for name, value in read}

    return run
