"""The checks of every command: of its files before it starts, and of its result when it is done."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from r2cli import console
from r2cli.cli import interrupt
from r2cli.cli.baseline import Baseline
from r2cli.config import layer_form, targets, values
from r2cli.config.groups import DEFAULT_SOURCE, FileForm, Inputs, Preparation
from r2cli.config.methods import PtqConfig
from r2cli.config.option import Config
from r2cli.config.training import QatConfig
from r2cli.errors import CheckFailed, InputError

UNMEASURED = "is a bound on what was not measured: leave it out, or measure it with --overwrite"


def source(given: Inputs) -> Path:
    """Return the file that a command reads: a checkpoint, or --weights; for --pretrained a name for what is made of it.

    Raises InputError if two of them are given.
    """
    if given.weights is not None and given.pretrained:
        raise InputError(f"--weights {given.weights} and --pretrained are two networks: give one of them")
    other = f"--weights {given.weights}" if given.weights is not None else "--pretrained" if given.pretrained else None
    if given.source is not None and other is not None:
        raise InputError(f"{given.source} and {other} are two networks: give one of them")
    if given.pretrained and given.model is not None:
        return Path(f"{given.model.rpartition(':')[2]}.safetensors")
    return given.weights or given.source or DEFAULT_SOURCE


def beside(source: Path, ending: str) -> Path:
    """Return the default output: `source` with another ending, for example 'w4a8-none.safetensors'."""
    if source.is_dir() or not source.name:
        raise InputError(f"{source} is a directory: name the checkpoint in it")
    return source.with_name(f"{source.stem}.{ending}")


def require_output(output: Path, ending: str, *, source: Path | None = None) -> None:
    """Raise InputError for an output that is a directory, has another ending, or is the source itself."""
    if output.is_dir() or not output.name:
        raise InputError(f"{output} is a directory: name a file with --output")
    if output.suffix != ending:
        raise InputError(f"--output {output} must end in {ending}")
    if source is not None and output.resolve() == source.resolve():
        raise InputError(f"--output {output} is the source itself: give another name")


def require_kept(source: Path, file: Path) -> None:
    """Raise InputError where `file`, which is written beside --output, is the source itself."""
    if file.resolve() == source.resolve():
        raise InputError(f"{file}, which is written beside --output, is the source itself: give another --output")


def require_free(paths: Iterable[Path], *, overwrite: bool) -> None:
    """Raise InputError if one of the outputs exists already. Commands call it before any work is done."""
    for path in paths:
        if path.exists() and not overwrite:
            raise InputError(f"{path} is there already: give --overwrite to replace it, or another --output")


def of_widths(config: PtqConfig | QatConfig, form: FileForm) -> None:
    """Raise InputError for an --opset that has not the activations which are asked for; and `warn_of_speed`."""
    forms = layer_form.all_of(values.keep(config.keep))
    targets.require_opset(form.opset, values.trained_act_bits(config.act_bits), forms)
    warn_of_speed(config.act_bits)


def warn_of_speed(act_bits: int | str | None) -> None:
    """Say before any work that activations of fewer than 8 bits are no faster: each grid clips its codes, which are
    bytes all the same; and that those of 16 bits are read by no integer kernel."""
    if str(act_bits) == "16":
        console.note("--act-bits 16 runs slower than float in ONNX Runtime: it has no integer kernels for 16 bits")
    if str(act_bits) in map(str, range(1, 8)):
        console.note(
            f"--act-bits {act_bits} runs slower than 8 in ONNX Runtime: codes stay bytes, and each grid clips them"
        )


@contextmanager
def told_of(state: Path) -> Iterator[None]:
    """If the block is interrupted, say which file the run can be resumed from."""

    def words() -> str:
        return f"{state} holds the last whole epoch: go on with --resume" if state.exists() else ""

    try:
        with interrupt.telling(words):
            yield
    except KeyboardInterrupt:
        if said := words():
            console.note(said)
        raise


def require_measurable(wanted: Config, known: Collection[str], why: str) -> None:
    """Raise InputError for a gate beside the `known` ones: `why` says what is missing to measure it."""
    for own in fields(wanted):
        if own.name not in known and getattr(wanted, own.name) is not None:
            raise InputError(f"{why}: leave out --{own.name.replace('_', '-')}")


def ended_higher(losses: Sequence[float], *, mend: str) -> list[str]:
    """Return a line if training ended with a higher loss than its first epoch: most likely its steps were too large.

    `mend` names the options to lower.
    """
    if not losses or losses[-1] <= losses[0]:
        return []
    return [f"the last epoch's loss is above the first one's ({losses[-1]:.2f}, {losses[0]:.2f}): lower {mend}"]


def judge(
    report: dict[str, Any],
    wanted: Config,
    *,
    size: int | None = None,
    latency: float | None = None,
    baseline: Baseline | None = None,
) -> None:
    """Keep every gate of `wanted` that was asked for under "gates" of `report`: its name, and whether it is met.

    A gate whose value was not measured is not met.
    """
    away = report.get("float_sqnr_db")
    measured = {
        **_of_metric(report, baseline),
        "min_sqnr": (away, False, f"outputs at {away or 0:.1f} dB from the float network's are below"),
        "max_bytes": (size, True, f"{size} bytes are above"),
        "max_latency": (latency, True, f"{latency or 0:.2f} of the float network's time is above"),
    }
    found: list[dict[str, Any]] = []
    for name, (value, is_most, told) in measured.items():
        bound = getattr(wanted, name, None)
        bound = 0.0 if bound is None and name == "max_regression" and baseline else bound
        if bound is None:
            continue
        gate = f"--{name.replace('_', '-')} {bound if name == 'max_bytes' else format(bound, 'g')}"
        if value is None:
            missed, detail = True, f"{gate} {UNMEASURED}"
        else:
            missed, detail = value > bound if is_most else value < bound, f"{told} {gate}"
        found.append({"name": gate, "passed": not missed, "detail": detail if missed else ""})
    report["gates"] = found


def require(report: Mapping[str, Any]) -> None:
    """Raise CheckFailed, with the report, for the gates that `judge` kept in it and that are not met."""
    failed = [each["detail"] for each in report["gates"] if not each["passed"]]
    if failed:
        raise CheckFailed("gate failed: " + "; ".join(failed), report)


def _of_metric(report: Mapping[str, Any], baseline: Baseline | None) -> dict[str, tuple[float | None, bool, str]]:
    """The value of each gate of a metric, whether its bound is the most, and what is said before the bound."""
    metric, before = report.get("metric"), report.get("float_value")
    if metric is None:
        return dict.fromkeys(("min_accuracy", "min_metric", "max_drop", "max_regression"), (None, True, ""))
    value, higher = float(metric["value"]), metric["higher"]
    unit, digits = "dB" if metric["unit"] == "dB" else "points", 2 if metric["unit"] else 4

    def loss(other: float | None) -> float | None:
        if other is None:
            return None
        lost = other - value if higher else value - other
        return round(lost, 9) if metric["unit"] else lost  # 97.8 - 97.5 would be above 0.3

    drop, behind = loss(before), loss(baseline.value if baseline else None)
    then = f"the {baseline.value:.{digits}f} of {baseline.file}" if baseline else ""
    own = (value, not higher, f"{metric['shown']} is {'below' if higher else 'above'}")
    return {
        "min_accuracy": own,
        "min_metric": own,
        "max_drop": (drop, True, f"the drop of {drop or 0:.{digits}f} {unit} is above"),
        "max_regression": (behind, True, f"{metric['shown']} is {behind or 0:.{digits}f} {unit} behind {then}, above"),
    }


def again(given: Preparation) -> list[str]:
    """What the next command must be told again: data and metric with their keywords, as the words of options."""
    words: list[str] = []
    for name in ("data", "metric"):
        if value := getattr(given, name, None):
            words += [f"--{name}", value]
            words += [word for own in getattr(given, f"{name}_arg") for word in (f"--{name}-arg", own)]
    words += ["--metric-lower"] if given.metric_lower else []
    return words


def unreadable(files: Sequence[str]) -> list[str]:
    """Return a line with the number and names of images that were left out; nothing without such images."""
    if not files:
        return []
    named = ", ".join(files[:3]) + (", …" if len(files) > 3 else "")
    return [f"{len(files)} unreadable images were left out: {named}"]
