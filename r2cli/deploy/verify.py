"""The proof of an ONNX file: it is opened again, audited, run in ONNX Runtime and compared with the checkpoint.

Nothing here trusts the exporter: the file is audited as it was written, the weights are decoded by ONNX Runtime itself,
and the logits are those of sessions with optimisation off and at its default.
"""

import json
import platform
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto
from torch import Tensor, fx, nn

from r2cli import data
from r2cli.data import Batch
from r2cli.deploy import audit, comparison, onnx_functions, weight_roles
from r2cli.errors import InputError
from r2cli.graph import placement
from r2cli.quantized.coded import Coded
from r2cli.quantized.decibels import decibels
from r2cli.quantized.palette import Palette
from r2cli.storage import checkpoint as checkpoints
from r2cli.storage.checkpoint import Checkpoint, InputSpec

WEIGHT_ONLY_TOLERANCE = 1e-5  # relative: the order of float sums is all that may differ
AGREEMENT = 0.99  # share of equal decisions: a value on the edge of two codes may round either way
SQNR_DB = 30.0
# A deep network on coarse grids repeats itself less well than that: rounding at the edges of codes flips single codes,
# and the flips add up. The bound is then what the simulation keeps between float32 and float64, less this margin.
PRECISION_DB = 3.0
TOP1_POINTS = 0.5
OFF_SAMPLES = 512  # images for the slow session without optimisation, and for the float network
FOLLOWED = 8  # images of which every value on a grid is compared
REPEATED = 64  # images on which the simulation is compared with itself in float64
EXACT_PRODUCTS = "session.x64quantprecision"  # ONNX Runtime's session option; "1": no overflow without VNNI


@dataclass(frozen=True)
class Proof:
    checks: tuple[audit.Check, ...]
    measures: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def prove(
    path: Path,
    checkpoint: Checkpoint,
    model: nn.Module,
    batches: Iterable[Batch],
    float_network: nn.Module | None = None,
) -> Proof:
    """Audit the file at `path` against `checkpoint`, and run it beside `model`, the checkpoint's network, on `batches`.

    `float_network` is what the checkpoint was made from, as its own code builds it; None where it is not at hand.
    Raises InputError where the file is not a readable ONNX model.
    """
    written = _opened(path)
    file = onnx_functions.inline(written)
    on_grids = isinstance(model, fx.GraphModule) and bool(checkpoint.activations)
    left = placement.float_operations(model, checkpoint.input.shape) if on_grids else None  # type: ignore[arg-type]
    integer = audit.all_integer(file, checkpoint.coded, checkpoint.floats)
    checks = [
        audit.announced(file, integer, left),
        audit.nothing_beside(written, file),
        _same_codes(file, checkpoint.coded),
        comparison.same_biases(file, checkpoint),
        comparison.same_metadata(file, checkpoint),
        audit.size(file, path, checkpoint.coded),
    ]
    compared, first = _compare(path, model, batches, float_network)
    if on_grids:
        followed = _values(file, first[:FOLLOWED])
        checks += comparison.between_grids(model, first[:FOLLOWED], file, followed)  # type: ignore[arg-type]
    away = compared["float"].sqnr if compared["float"].samples else None
    least = SQNR_DB
    if on_grids and min(compared[name].sqnr for name in ("default", "off")) < SQNR_DB:
        least = min(SQNR_DB, comparison.own_precision(model, first[:REPEATED]) - PRECISION_DB)
    parity = _parity(compared, exact=not checkpoint.activations, least=least)
    checks += [_runs(file, path, compared), comparison.with_float(parity, away, stated=bool(checkpoint.coded))]
    held = audit.held_weights(file, checkpoint.coded)
    payload = sum(coded.payload_bytes() for coded in checkpoint.coded.values())
    weights = sum(coded.decode().numel() for coded in checkpoint.coded.values())
    measures = {
        "top1": compared["default"].top1,
        "torch_top1": compared["torch"].top1,
        "bytes": path.stat().st_size,
        "bits_per_weight": 8 * payload / weights if weights else 32.0,
        "agreement": compared["default"].agreement,
        "sqnr_db": compared["default"].sqnr,
        "float_sqnr_db": away,
        "integer_share": held.share,
        "float_weights": [each.__dict__ for each in held.floats],
        "overflow_db": compared["overflowing"].sqnr if compared["overflowing"].samples else None,
        "samples": compared["default"].samples,
        "nodes": node_counts(path),
        "float_operations": [each.__dict__ for each in left or ()],
        "ticks": f"{sum(check.passed for check in checks)}/{len(checks)}",
        "cpu": cpu(),
    }
    return Proof(tuple(checks), measures)


def read(path: Path) -> onnx.ModelProto:
    """The ONNX model at `path`, with its functions inlined. Raises InputError for a missing or corrupt one."""
    return onnx_functions.inline(_opened(path))


def _opened(path: Path) -> onnx.ModelProto:
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
        first = str(error).strip().splitlines()[0]
        what = "the file" if isinstance(path, bytes) else path
        raise InputError(f"{what} does not load in ONNX Runtime {ort.__version__}: {first}") from error


def runner(path: Path, **options: Any) -> Callable[[Tensor], Tensor]:
    """A function from images (n, c, s, s) to logits (n, classes), by ONNX Runtime."""
    own = session(path, **options)
    name = own.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        try:
            return torch.from_numpy(own.run(None, {name: images.cpu().contiguous().numpy()})[0])
        except Exception as error:  # as above
            first = str(error).strip().splitlines()[0]
            raise InputError(f"{path} fails when ONNX Runtime {ort.__version__} runs it: {first}") from error

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


def _same_codes(file: onnx.ModelProto, coded: Mapping[str, Coded]) -> audit.Check:
    """ONNX Runtime's own decoding of every weight, without optimisation, equals the checkpoint's bit for bit."""
    if not coded:
        return audit.Check("same codes", True, "float network")
    shapes = {name: list(one.decode().shape) for name, one in coded.items()}
    decoded_weights = run_constants(file, shapes)
    for (name, one), found in zip(coded.items(), decoded_weights, strict=True):
        if not np.array_equal(found, one.decode().numpy()) or not _same_indices(file, name, one):
            return audit.Check("same codes", False, f"{name} decodes to other values than the checkpoint's")
    return audit.Check(
        "same codes",
        True,
        f"{sum(w.size for w in decoded_weights):,} weights decoded by ONNX Runtime, all equal",
    )


def _same_indices(file: onnx.ModelProto, name: str, coded: Coded) -> bool:
    """Whether a palette's indices are the checkpoint's: two of them may stand for one value."""
    if not isinstance(coded.codec, Palette):
        return True
    held = audit.codes(name, weight_roles.sources(file), {each.name: each for each in file.graph.initializer})
    indices = coded.packed() if coded.codec.bits <= 4 else coded.codes
    return b"".join(each.raw_data for each in held) == indices.numpy().tobytes()


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
        found: list[Any] = session(path, optimise=False).run(list(shapes), {})
    return found


# --- runs and parity -----------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """One engine on the samples: top-1 in percent, and how its logits compare with torch's."""

    correct: int = 0
    samples: int = 0
    equal: int = 0
    decided: int = 0  # equal, or torch's own lead over the other class is within the noise that SQNR_DB allows
    signal: float = 0.0
    noise: float = 0.0
    worst: float = 0.0  # max |difference| / max |reference|

    def add(self, logits: Tensor, reference: Tensor, labels: Tensor) -> None:
        difference = (logits - reference).double()
        self.samples += len(labels)
        self.correct += int((logits.argmax(1) == labels).sum())
        equal = logits.argmax(1) == reference.argmax(1)
        lead = reference.amax(1) - reference.gather(1, logits.argmax(1, keepdim=True)).squeeze(1)
        noise = 10 ** (-SQNR_DB / 20) * reference.square().mean(1).sqrt()
        self.equal += int(equal.sum())
        self.decided += int((equal | (lead <= noise)).sum())
        self.signal += float(reference.double().square().sum())
        self.noise += float(difference.square().sum())
        scale = float(reference.abs().max())
        self.worst = max(self.worst, float(difference.abs().max()) / (scale or 1.0))

    @property
    def top1(self) -> float:
        return 100 * self.correct / self.samples

    @property
    def agreement(self) -> float:
        return 100 * self.equal / self.samples

    @property
    def sqnr(self) -> float:
        """Logits' signal to noise in dB, at most 200."""
        return min(200.0, decibels(self.signal, self.noise))


def _values(file: onnx.ModelProto, images: Tensor) -> dict[str, Tensor]:
    """The file's result and every value that it puts on a grid, by name, without optimisation."""
    open_file = onnx.ModelProto()
    open_file.CopyFrom(file)
    open_file.graph.output.extend(onnx.ValueInfoProto(name=name) for name in comparison.exposed(file))
    own = session(open_file.SerializeToString(), optimise=False)
    names, given = [each.name for each in own.get_outputs()], own.get_inputs()[0].name
    found = own.run(names, {given: images.cpu().contiguous().numpy()})
    return {given: images.cpu()} | {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}


@torch.inference_mode()
def _compare(
    path: Path, model: nn.Module, batches: Iterable[Batch], float_network: nn.Module | None
) -> tuple[dict[str, _Run], Tensor]:
    """Every engine on the samples, and the first of them; 'overflowing' is ONNX Runtime without `EXACT_PRODUCTS`, where
    that matters, and 'float' the checkpoint's network beside the user's float one."""
    engines = {"default": runner(path), "off": runner(path, optimise=False)}
    if not has_vnni():
        engines["overflowing"] = runner(path, exact=False)
    runs = {name: _Run() for name in ("torch", "default", "off", "overflowing", "float")}
    first = None
    model.eval()
    for images, labels in batches:
        first = images if first is None else first
        reference, labels = model(images).cpu(), labels.cpu()
        if float_network is not None and runs["float"].samples < OFF_SAMPLES:
            runs["float"].add(reference, float_network(images.clone()).cpu(), labels)  # it may write into its input
        runs["torch"].add(reference, reference, labels)
        for name, engine in engines.items():
            if name == "default" or runs["off"].samples < OFF_SAMPLES:
                runs[name].add(engine(images), reference, labels)
    if first is None:
        raise InputError("there is no image to compare the file on: the test split is empty")
    return runs, first.cpu()


def _runs(file: onnx.ModelProto, path: Path, runs: Mapping[str, _Run]) -> audit.Check:
    foreign = next((node for node in file.graph.node if node.domain not in ("", "ai.onnx")), None)
    if foreign is not None:
        return audit.Check("runs", False, f"{foreign.op_type} is not a standard operator, but of {foreign.domain}")
    finite = all(np.isfinite(runs[name].worst) for name in ("default", "off"))
    counts = node_counts(path)
    integer = sum(n for op, n in counts.items() if op.startswith(("QLinear", "QGemm", "MatMulInteger")))
    left = sum(counts.get(op, 0) for op in ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul"))
    detail = (
        f"ONNX Runtime {ort.__version__}, optimisation off and default; {integer} integer nodes, {left} float layers"
    )
    return audit.Check("runs", finite, detail if finite else "logits are not finite")


def _parity(runs: Mapping[str, _Run], *, exact: bool, least: float) -> audit.Check:
    if exact:
        worst = max(runs["default"].worst, runs["off"].worst)
        return audit.Check("parity", worst <= WEIGHT_ONLY_TOLERANCE, f"logits within {worst:.1e} of torch's, relative")
    told, passed = [], True
    for name in ("default", "off"):
        run = runs[name]
        passed &= run.samples - run.decided <= max(1, (1 - AGREEMENT) * run.samples)
        passed &= run.sqnr >= least
        told.append(f"{run.agreement:.1f} % / {run.sqnr:.0f} dB {name}")
    gap = runs["default"].top1 - runs["torch"].top1
    one_image = 100 / runs["default"].samples
    passed &= abs(gap) <= max(TOP1_POINTS, one_image)
    return audit.Check("parity", passed, f"argmax and logits as torch's: {', '.join(told)}; top-1 {gap:+.2f}")
