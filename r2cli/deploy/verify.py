"""The proof of an ONNX file: it is opened again, audited, run in ONNX Runtime and compared with the checkpoint.

Nothing here trusts the exporter: the file is audited as it was written, the weights are decoded by ONNX Runtime itself,
and the logits are those of sessions with optimisation off and at its default.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, fx, nn

from r2cli.config import targets
from r2cli.data import Batch
from r2cli.deploy import audit, comparison, runtime, weight_nodes, weight_roles
from r2cli.deploy.retarget import retarget
from r2cli.errors import InputError
from r2cli.graph import placement
from r2cli.graph.transposed import TransposedConv, exchanged
from r2cli.quantized.coded import Coded
from r2cli.quantized.decibels import decibels
from r2cli.quantized.palette import Palette
from r2cli.storage.checkpoint import Checkpoint

WEIGHT_ONLY_TOLERANCE = 1e-5  # relative: the order of float sums is all that may differ
AGREEMENT = 0.99  # share of equal decisions: a value on the edge of two codes may round either way
SQNR_DB = 30.0
TOP1_POINTS = 0.5
OFF_SAMPLES = 64  # images for the slow session without optimisation, and for the float network
FOLLOWED = 8  # images of which every value on a grid is compared
FOLLOWED_PIXELS = 2**14  # of images whose values are held at once: at 224 pixels a mobile network has 100 MB of them


@dataclass(frozen=True)
class Proof:
    checks: tuple[audit.Check, ...]
    measures: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def extended(self, checks: Sequence[audit.Check], measures: Mapping[str, Any]) -> "Proof":
        """This proof with more checks and measures; its ticks are counted again."""
        every = (*self.checks, *checks)
        ticks = f"{sum(check.passed for check in every)}/{len(every)}"
        return Proof(every, {**self.measures, **measures, "ticks": ticks})


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
    written = runtime.opened(path)
    checkpoint = retarget(checkpoint, runtime.target_of(written))
    file = runtime.inlined(written)
    on_grids = isinstance(model, fx.GraphModule) and bool(checkpoint.activations)
    left = placement.float_operations(model, checkpoint.input.shape) if on_grids else None  # type: ignore[arg-type]
    integer = audit.all_integer(file, checkpoint.coded, checkpoint.floats)
    checks = [
        audit.announced(file, integer, left),
        audit.nothing_beside(written, file),
        _same_codes(file, checkpoint, model),
        comparison.same_biases(file, checkpoint),
        comparison.same_metadata(file, checkpoint),
        audit.size(file, path, checkpoint.coded, targets.get(checkpoint.target)),
    ]
    try:
        compared, first = _compare(path, model, batches, float_network)
        if on_grids:
            checks += _parts(model, first[:FOLLOWED], file)  # type: ignore[arg-type]
        follows = on_grids and all(check.passed for check in checks[-2:])
        parity = _parity(compared, exact=not checkpoint.activations, follows=follows)
        away = compared["float"].sqnr if compared["float"].samples else None
        checks += [_runs(file, path, compared), comparison.with_float(parity, away, stated=bool(checkpoint.coded))]
        seen = _seen(compared, away) | {"nodes": runtime.node_counts(path)}
    except runtime.UnrunnableError as error:
        checks.append(audit.Check("runs", False, str(error)))
        checks += _wrong_parts(model, checkpoint, file) if on_grids else []  # type: ignore[arg-type]
        seen = dict.fromkeys((*_seen({}, None), "nodes"))
    held = audit.held_weights(file, checkpoint.coded)
    payload = sum(coded.payload_bytes() for coded in checkpoint.coded.values())
    weights = sum(coded.decode().numel() for coded in checkpoint.coded.values())
    measures = {
        **seen,
        "bytes": path.stat().st_size,
        "bits_per_weight": 8 * payload / weights if weights else 32.0,
        "integer_share": held.share,
        "float_weights": [each.__dict__ for each in held.floats],
        "float_operations": [each.__dict__ for each in left or ()],
        "ticks": f"{sum(check.passed for check in checks)}/{len(checks)}",
        "cpu": runtime.cpu(),
    }
    return Proof(tuple(checks), measures)


def _seen(runs: Mapping[str, "LogitsRun"], away: float | None) -> dict[str, Any]:
    """What the runs of `_compare` say in numbers; None each where there are none."""
    default, torch_run, overflowing = (runs.get(name, LogitsRun()) for name in ("default", "torch", "overflowing"))
    ran = default.samples > 0
    return {
        "top1": default.top1 if ran else None,
        "torch_top1": torch_run.top1 if ran else None,
        "agreement": default.agreement if ran else None,
        "sqnr_db": default.sqnr if ran else None,
        "float_sqnr_db": away,
        "overflow_db": overflowing.sqnr if overflowing.samples else None,
        "samples": default.samples,
    }


def _parts(model: fx.GraphModule, images: Tensor, file: onnx.ModelProto) -> list[audit.Check]:
    """Whether each part of the file computes what `model` does, with optimisation off and at its default."""
    off = runtime.values(file, comparison.exposed(file), optimise=False)
    default = runtime.values(file, comparison.coded_values(file), optimise=True)
    at_once = max(1, FOLLOWED_PIXELS // images[0, 0].numel())
    told: dict[str, audit.Check] = {}
    for few in torch.split(images, at_once):
        for check in comparison.between_grids(model, few, file, off(few), default(few)):
            if told.setdefault(check.name, check).passed:  # the first that fails is told
                told[check.name] = check
    return list(told.values())


def _wrong_parts(model: fx.GraphModule, checkpoint: Checkpoint, file: onnx.ModelProto) -> list[audit.Check]:
    """Which parts of a file that ONNX Runtime does not run optimised are wrong as it is written: they may be why."""
    images = torch.rand(checkpoint.input.blank(2).shape, generator=torch.Generator().manual_seed(0))
    try:
        written = runtime.values(file, comparison.exposed(file), optimise=False)(images)
    except runtime.UnrunnableError:
        return []
    return [check for check in comparison.between_grids(model, images, file, written, written) if not check.passed]


def _same_codes(file: onnx.ModelProto, checkpoint: Checkpoint, model: nn.Module) -> audit.Check:
    """ONNX Runtime's own decoding of every weight, without optimisation, equals the checkpoint's bit for bit."""
    coded, target = checkpoint.coded, targets.get(checkpoint.target)
    if not coded:
        return audit.Check("same codes", True, "float network")
    expected = {name: one.decode() for name, one in coded.items()}
    for name, module in model.named_modules():
        if isinstance(module, TransposedConv) and f"{name}.weight" in coded:
            expected[f"{name}.weight"] = exchanged(expected[f"{name}.weight"], module.groups)
    shapes = {name: list(tensor.shape) for name, tensor in expected.items()}
    try:
        decoded_weights = runtime.run_constants(file, shapes)
    except runtime.UnrunnableError as error:
        return audit.Check("same codes", False, str(error))
    for (name, one), found in zip(coded.items(), decoded_weights, strict=True):
        same = not weight_nodes.is_packed(one.codec, target) or _same_indices(file, name, one)
        if not same or not np.array_equal(found, expected[name].numpy()):
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
    held = weight_roles.codes(file, name)
    indices = coded.packed() if coded.codec.bits <= 4 else coded.codes
    return b"".join(each.raw_data for each in held) == indices.numpy().tobytes()


# --- runs and parity -----------------------------------------------------------------------------------------------


@dataclass
class LogitsRun:
    """One engine on the samples: top-1 in percent, and how its logits compare with torch's."""

    correct: int = 0
    resolved: int = 0  # correct, where two equal logits are decided as torch decided them
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
        other = logits.amax(1) - logits.gather(1, reference.argmax(1, keepdim=True)).squeeze(1)
        chosen = torch.where((lead == 0) | (other == 0), reference.argmax(1), logits.argmax(1))
        self.resolved += int((chosen == labels).sum())
        noise = 10 ** (-SQNR_DB / 20) * reference.square().mean(1).sqrt()
        self.equal += int(equal.sum())
        self.decided += int((equal | (other == 0) | (lead <= noise)).sum())
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


@torch.inference_mode()
def _compare(
    path: Path, model: nn.Module, batches: Iterable[Batch], float_network: nn.Module | None
) -> tuple[dict[str, LogitsRun], Tensor]:
    """Every engine on the samples, and the first of them; 'overflowing' is ONNX Runtime without `EXACT_PRODUCTS`, where
    that matters, and 'float' the checkpoint's network beside the user's float one."""
    engines = {"default": runtime.runner(path), "off": runtime.runner(path, optimise=False)}
    if not runtime.has_vnni():
        engines["overflowing"] = runtime.runner(path, exact=False)
    runs = {name: LogitsRun() for name in ("torch", "default", "off", "overflowing", "float")}
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


def _runs(file: onnx.ModelProto, path: Path, runs: Mapping[str, LogitsRun]) -> audit.Check:
    foreign = next((node for node in file.graph.node if node.domain not in ("", "ai.onnx")), None)
    if foreign is not None:
        return audit.Check("runs", False, f"{foreign.op_type} is not a standard operator, but of {foreign.domain}")
    finite = all(np.isfinite(runs[name].worst) for name in ("default", "off"))
    counts = runtime.node_counts(path)
    integer = sum(n for op, n in counts.items() if op.startswith(("QLinear", "QGemm", "MatMulInteger")))
    left = sum(counts.get(op, 0) for op in ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul"))
    detail = (
        f"ONNX Runtime {runtime.VERSION}, optimisation off and default; {integer} integer nodes, {left} float layers"
    )
    return audit.Check("runs", finite, detail if finite else "logits are not finite")


def _parity(runs: Mapping[str, LogitsRun], *, exact: bool, follows: bool) -> audit.Check:
    """Whether the logits are torch's.

    On grids, a value on the edge of two codes may round either way. In a deep network on coarse grids such flips add up
    to less than `SQNR_DB` without any fault: two runs of torch, in float32 and float64, differ as much there. So logits
    that are far from torch's are right where the file `follows`: each of its parts is right from the codes before it,
    on the first `FOLLOWED` images. There is no bound on dB then, and the report has them.
    """
    if exact:
        worst = max(runs["default"].worst, runs["off"].worst)
        return audit.Check("parity", worst <= WEIGHT_ONLY_TOLERANCE, f"logits within {worst:.1e} of torch's, relative")
    told, near = [], True
    for name in ("default", "off"):
        run = runs[name]
        near &= run.samples - run.decided <= max(1, (1 - AGREEMENT) * run.samples)
        near &= run.sqnr >= SQNR_DB
        told.append(f"{run.agreement:.1f} % / {run.sqnr:.0f} dB {name}")
    one_image = 100 / runs["default"].samples
    gap = one_image * (runs["default"].resolved - runs["torch"].resolved)
    near &= abs(gap) <= max(TOP1_POINTS, one_image)
    detail = f"argmax and logits beside torch's: {', '.join(told)}; top-1 {gap:+.2f}"
    if follows and not near:
        detail += "; each part is right, and single codes at the edge of two add up"
    return audit.Check("parity", near or follows, detail)
