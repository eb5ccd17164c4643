"""`r2 compare`: where a quantized network loses what its float network had."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r2cli import console, registry
from r2cli.cli import gates
from r2cli.cli.command import Report, command
from r2cli.config import layer_form, targets
from r2cli.config.inspection import CompareConfig, CompareFiles, CompareOutput
from r2cli.errors import InputError

if TYPE_CHECKING:
    from r2cli.analysis.depth import Comparison, Depth, Mend, ValueLoss
    from r2cli.storage.checkpoint import Checkpoint

NAME, BAR = 26, 8  # characters
PAGE = ".html"
NAMED = 6  # layers in a sentence
MENDS = 8  # choices in the table
SHARES = (("weights", "weights"), ("bias", "bias"), ("clipping", "clip"), ("rounding", "round"))


@command
def compare(given: CompareFiles, config: CompareConfig, written: CompareOutput) -> Report:
    """Show where a quantized network loses: what arrives at each layer, what each adds, and what that costs."""
    if given.source is None or given.candidate is None:
        raise InputError("two networks are compared: give the float one, and what was made of it")
    outputs = [] if written.output is None else [written.output]
    drawn_as = "" if written.output is None else written.output.suffix
    if drawn_as not in ("", ".png", PAGE):
        raise InputError(f"--output {written.output} must end in .png or .html")
    gates.require_free(outputs, overwrite=written.overwrite)
    if written.dry_run:
        console.tell([f"would compare {given.candidate} with {given.source}"], as_json=written.json)
        return {"command": "compare"}

    from r2cli import api
    from r2cli.api import inputs

    made, source = inputs.load(given, tell=console.note)
    after = _candidate(given, made)
    console.note(f"comparing {given.candidate} with {given.source} on {min(config.samples, len(source.test))} samples")
    history = _history(after)
    found = api.compare(made, after, source, config, pictures=drawn_as == PAGE, reporter=console)
    if written.output is not None:
        from r2cli.analysis import depth_page, plots
        from r2cli.storage.atomic import write_atomically

        title = str(given.candidate)
        drawn_now = depth_page.to_bytes(found, title) if drawn_as == PAGE else plots.depth(found.depth, title=title)
        write_atomically(written.output, drawn_now)
    report = {"command": "compare", "reference": given.source, "candidate": given.candidate, **_reported(found)}
    drawn = [f"wrote {path}" for path in outputs]
    told = [
        *_told(found, config),
        *_mends(found.mends, costs=config.cost is not None),
        *drawn,
        console.next_step(*_next(given, found, history)),
    ]
    console.tell(told, as_json=written.json)
    return report


def _candidate(given: CompareFiles, made: "Checkpoint") -> "Checkpoint | Path":
    """The quantized file: a checkpoint's network is made as the reference's is, where that is the user's own code."""
    from r2cli.storage import checkpoint

    path = given.candidate or Path()
    if path.suffix == ".onnx":
        return path
    if path.suffix == ".tflite":
        raise InputError(
            f"{path} is a file for a runtime: give the checkpoint beside it, {path.with_suffix('.safetensors')}"
        )
    after = checkpoint.load(path)
    if made.model.factory is not None and after.model == made.model:
        after = replace(after, model=made.model)
    return after


def _history(after: "Checkpoint | Path") -> "Sequence[Mapping[str, Any]]":
    """What was done for the candidate, if it is of ours."""
    if not isinstance(after, Path):
        return after.history
    from r2cli.deploy import runtime

    return runtime.recorded(after).history if runtime.is_ours(after) else ()


def _reported(found: "Comparison") -> dict[str, Any]:
    from r2cli.data.metrics import report_of

    measured = {
        name: one and report_of(one.metric, one.value, others=dict(one.others))
        for name, one in (("metric_before", found.before), ("metric", found.after))
    }
    values = [value.__dict__ for value in found.depth.values]
    worst = [value.name for value in found.depth.worst()]
    mends = [mend.told() for mend in found.mends]
    told = {"samples": found.samples, "outputs_db": list(found.depth.outputs), "begins": found.depth.begins}
    return {**told, "half_of_the_cost": worst, **measured, "layers": values, "mends": mends}


def ordered(depth: "Depth", by: str) -> "list[ValueLoss]":
    """The values by one of their numbers, the worst first, or as they run."""
    return list(depth.values) if by == "depth" else sorted(depth.values, key=lambda value: float(getattr(value, by)))


def _told(found: "Comparison", config: CompareConfig) -> list[console.Line]:
    depth = found.depth
    rows = ordered(depth, config.sort)
    shown = rows[: config.limit] if config.limit else rows
    most = max(*(value.cost for value in shown if value.cost < float("inf")), min(depth.outputs) + 1)
    head = ("layer", "costs dB", "own", "arrives", *(short for _, short in SHARES), "")
    lines: list[console.Line] = [console.table(head, [_cells(value, min(depth.outputs), most) for value in shown])]
    if len(rows) > len(shown):
        lines.append(f"{len(rows) - len(shown)} more: --limit 0 shows all")
    worst = [value.name for value in depth.worst()]
    named = ", ".join(worst[:NAMED]) + (" …" if len(worst) > NAMED else "")
    lines.append(f"half of the outputs' noise comes from {len(worst)} of {len(rows)}: {named}")
    if depth.begins is not None:
        lines.append(f"{depth.begins} is the first at which no more arrives than at the outputs")
    weights = [value.parts["weights"] for value in rows if value.parts["weights"] < float("inf")]
    if 2 * sum(share < 0 for share in weights) > len(weights):
        lines.append("most weights differ by more than they are: was this file made of another float network?")
    outputs = ", ".join(_decibel(value) for value in depth.outputs)
    measured = "" if found.before is None else f"; {found.before} -> {found.after}"
    lines.append(f"outputs: {outputs} dB to float on {found.samples} samples{measured}")
    return lines


def _cells(value: "ValueLoss", outputs: float, most: float) -> tuple[object, ...]:
    numbers = (value.cost, value.own, value.arriving, *(value.parts[part] for part, _ in SHARES))
    length = max(0.0, min(1.0, (most - value.cost) / (most - outputs)))
    return (console.ending(value.name, NAME), *map(_decibel, numbers), console.bar_of(round(length * BAR)))


def _decibel(value: float) -> str:
    return "-" if value == float("inf") else f"{value:.1f}"


def _mends(mends: "Sequence[Mend]", *, costs: bool) -> list[console.Line]:
    """What other choices bring, the most for a byte first, or for its cost."""
    cells = [
        (
            *(console.ending(mend.layer, NAME), mend.choice, f"+{mend.won:.1f}", f"{mend.bytes:,}"),
            *(("?" if mend.cost is None else f"{mend.cost:.4g}", _per(mend)) if costs else ()),
        )
        for mend in mends[:MENDS]
    ]
    head = ("mend", "with", "dB", "more bytes", *(("more cost", "dB for 1") if costs else ()))
    return [console.table(head, cells)] if cells else []


def _per(mend: "Mend") -> str:
    """The dB for one more unit of cost."""
    return f"{mend.won / mend.cost:.3g}" if mend.cost is not None and mend.cost > 0 else "-"


def _next(given: CompareFiles, found: "Comparison", history: "Sequence[Mapping[str, Any]]") -> list[str]:
    """The next command: the candidate's options, and for each layer the first choice; else learn how to round."""
    asked = history[-1]["options"] if history and history[-1]["command"] == "ptq" else {}
    own = _again(asked, with_method=bool(found.mends)) if asked else []
    options = [*own, *(mended(found.mends) or ["--method brecq"])]
    return ["r2", "ptq", str(given.source), *shlex.split(" ".join(options))]


def mended(mends: "Sequence[Mend]") -> list[str]:
    """For each value the choice that stands first, unless a layer is to be float by one and another says more of it."""
    chosen: dict[str, str] = {}
    told: dict[str, str] = {}
    for mend in mends:
        clashes = any(layer_form.FLOAT in (word, told[layer]) for layer, word in mend.keep.items() if layer in told)
        if mend.layer not in chosen and not clashes:
            chosen[mend.layer] = mend.options
            told |= mend.keep
    return [*dict.fromkeys(chosen.values())]


def _again(asked: Mapping[str, Any], *, with_method: bool) -> list[str]:
    """The options that `r2 ptq` had, without those that it has by itself."""
    bits, method = asked["weight_bits"], asked["method"]
    usual = {"weight_range": registry.usual_weight_range(method, bits), "target": targets.DEFAULT}
    own = [f"--weight-bits {bits}", f"--act-bits {asked['act_bits'] or 'none'}"]
    own += [f"--granularity {asked['granularity']}"]
    own += [f"--method {method}"] if with_method and method != registry.PTQ_NEAREST else []
    others = {name: asked.get(name, each) for name, each in usual.items()}  # files of older versions lack some
    own += [f"--{name.replace('_', '-')} {each}" for name, each in others.items() if each != usual[name]]
    own += [] if asked.get("symmetric", True) else ["--asymmetric"]
    return own + layer_form.shown(asked.get("keep") or {})
