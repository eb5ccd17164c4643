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
from torch import fx, nn

from r2cli.config import targets
from r2cli.data import Batch
from r2cli.data.metrics import Measured, report_of
from r2cli.data.task import CLASSIFICATION, Task
from r2cli.deploy import audit, comparison, parity, runtime, weight_nodes, weight_roles
from r2cli.deploy.retarget import retarget
from r2cli.graph import left_float, placement
from r2cli.graph.transposed import TransposedConv, exchanged
from r2cli.quantized.coded import Coded
from r2cli.quantized.palette import Palette
from r2cli.storage.checkpoint import Checkpoint
from r2cli.storage.input_spec import Given, each, places


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
    task: Task = CLASSIFICATION,
) -> Proof:
    """Audit the file at `path` against `checkpoint`, and run it beside `model`, the checkpoint's network, on `batches`.

    `float_network` is what the checkpoint was made from, as its own code builds it; None where it is not at hand. The
    `task` says whether the first output decides among classes. Raises InputError where the file is not a readable ONNX
    model.
    """
    written = runtime.opened(path)
    comparison.require_codes(written, checkpoint)
    checkpoint = retarget(checkpoint, runtime.target_of(written))
    file = runtime.inlined(written)
    on_grids = isinstance(model, fx.GraphModule) and bool(checkpoint.activations)
    asked = left_float.asked(checkpoint) if checkpoint.coded else []
    left = _left(model, checkpoint, asked) if on_grids else None  # type: ignore[arg-type]
    integer = audit.all_integer(file, checkpoint.coded, checkpoint.floats, asked)
    checks = [
        audit.announced(file, integer, left),
        audit.nothing_beside(written, file),
        _same_codes(file, checkpoint, model),
        comparison.same_biases(file, checkpoint),
        comparison.same_metadata(file, checkpoint),
        audit.size(file, path, checkpoint.coded, targets.get(checkpoint.target)),
    ]
    try:
        compared, first = parity.compare(path, model, batches, float_network, checkpoint.outputs, task)
        if on_grids:
            checks += _parts(model, each(first, lambda one: one[: comparison.FOLLOWED]), file)  # type: ignore[arg-type]
        follows = on_grids and all(check.passed for check in checks[-2:])
        decide = parity.decisions(compared) if compared["default"].decides else None
        told = parity.check(compared, decide, exact=not checkpoint.activations, follows=follows)
        away = compared["float"].sqnr if compared["float"].samples else None
        counts = runtime.node_counts(path)
        checks += [_runs(file, counts, compared), comparison.with_float(told, away, stated=bool(checkpoint.coded))]
        seen = _seen(compared, away) | {"nodes": counts}
    except runtime.UnrunnableError as error:
        checks.append(audit.Check("runs", False, str(error)))
        checks += _wrong_parts(model, checkpoint, file) if on_grids else []  # type: ignore[arg-type]
        seen = dict.fromkeys((*_seen({}, None), "nodes"))
    held = audit.held_weights(file, checkpoint.coded)
    measures = {
        **seen,
        "bytes": path.stat().st_size,
        "bits_per_weight": checkpoint.bits_per_weight,
        "integer_share": held.share,
        "float_weights": [each.__dict__ for each in held.floats],
        "float_operations": [each.__dict__ for each in left or ()],
        "ticks": f"{sum(check.passed for check in checks)}/{len(checks)}",
        "cpu": runtime.cpu(),
    }
    return Proof(tuple(checks), measures)


def _left(model: fx.GraphModule, checkpoint: Checkpoint, asked: Sequence[str]) -> list[placement.FloatOperation]:
    """What the checkpoint's network computes in float, the layers among it that were `asked` to."""
    with left_float.hidden(model, asked):
        return placement.float_operations(model, checkpoint.input.shape)


def _seen(runs: Mapping[str, parity.EngineRun], away: float | None) -> dict[str, Any]:
    """What the runs of `parity.compare` say in numbers; None each where there are none."""
    default, torch_run, overflowing = (
        runs.get(name, parity.EngineRun()) for name in ("default", "torch", "overflowing")
    )
    ran, away_of = default.samples > 0, runs.get("float", parity.EngineRun()).outputs
    return {
        "metric": _metric(default.measured, torch_run.measured),
        "top1": None if default.measured is None else default.measured.top1,
        "torch_top1": None if torch_run.measured is None else torch_run.measured.top1,
        "agreement": default.agreement if default.decides else None,
        "sqnr_db": default.sqnr if ran else None,
        "outputs": {
            name: {"sqnr_db": one.sqnr, "float_sqnr_db": away_of[name].sqnr if name in away_of else None}
            for name, one in default.outputs.items()
        },
        "float_sqnr_db": away,
        "overflow_db": overflowing.sqnr if overflowing.samples else None,
        "samples": default.samples,
    }


def _metric(found: Measured | None, torch_s: Measured | None) -> dict[str, Any] | None:
    """What the report says of the task's metric: of the file, and of torch where that ran on every sample."""
    if found is None:
        return None
    beside = None if torch_s is None else torch_s.value
    return report_of(found.metric, found.value, torch=beside, others=dict(found.others))


def _parts(model: fx.GraphModule, images: Given, file: onnx.ModelProto) -> list[audit.Check]:
    """Whether each part of the file computes what `model` does, with optimisation off and at its default."""
    off = runtime.values(file, comparison.exposed(file), optimise=False)
    default = runtime.values(file, comparison.coded_values(file), optimise=True)
    return comparison.in_parts(model, images, file, off, default)


def _wrong_parts(model: fx.GraphModule, checkpoint: Checkpoint, file: onnx.ModelProto) -> list[audit.Check]:
    """Which parts of a file that ONNX Runtime does not run optimised are wrong as it is written: they may be why."""
    drawn = torch.Generator().manual_seed(0)
    given = each(
        checkpoint.input.blank(2), lambda x: torch.rand(x.shape, generator=drawn) if x.is_floating_point() else x
    )
    try:
        written = runtime.values(file, comparison.exposed(file), optimise=False)(*places(given))
    except runtime.UnrunnableError:
        return []
    return [check for check in comparison.between_grids(model, given, file, written, written) if not check.passed]


def _same_codes(file: onnx.ModelProto, checkpoint: Checkpoint, model: nn.Module) -> audit.Check:
    """ONNX Runtime's own decoding of every weight, without optimisation, equals the checkpoint's bit for bit."""
    coded, target = checkpoint.coded, targets.get(checkpoint.target)
    if not coded:
        return audit.Check("same codes", True, "float network")
    expected = {name: one.decode() for name, one in coded.items()}
    for name, module in model.named_modules():
        if isinstance(module, TransposedConv) and f"{name}.weight" in coded:
            expected[f"{name}.weight"] = exchanged(expected[f"{name}.weight"], module.groups)
    blocks = {node.output[0] for node in file.graph.node if any(one.name == "block_size" for one in node.attribute)}
    expected = {name: one.T if name in blocks else one for name, one in expected.items()}
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


def _runs(file: onnx.ModelProto, counts: Mapping[str, int], runs: Mapping[str, parity.EngineRun]) -> audit.Check:
    foreign = next((node for node in file.graph.node if node.domain not in ("", "ai.onnx")), None)
    if foreign is not None:
        return audit.Check("runs", False, f"{foreign.op_type} is not a standard operator, but of {foreign.domain}")
    finite = all(np.isfinite(runs[name].worst) for name in ("default", "off"))
    integer = sum(n for op, n in counts.items() if op.startswith(("QLinear", "QGemm", "MatMulInteger")))
    left = sum(counts.get(op, 0) for op in ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul"))
    detail = (
        f"ONNX Runtime {runtime.VERSION}, optimisation off and default; {integer} integer nodes, {left} float layers"
    )
    return audit.Check("runs", finite, detail if finite else "outputs are not finite")
