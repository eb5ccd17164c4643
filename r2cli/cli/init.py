"""`r2 init`: a commented recipe for a network of one's own, with the commands that it stands for."""

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r2cli import console
from r2cli.cli import gates
from r2cli.cli.command import Report, command
from r2cli.config.groups import Inputs
from r2cli.config.inspection import InitOutput
from r2cli.config.option import flag_of
from r2cli.errors import InputError

if TYPE_CHECKING:
    from r2cli import data as datasets
    from r2cli.data import metrics
    from r2cli.storage.checkpoint import Checkpoint

FILES = (".safetensors", ".onnx")
WEIGHTS = (".pth", ".pt", ".bin", ".ckpt")
# Bits of weights, the method that is worth its time there, and why.
PLAN = (
    (8, "none", "plain rounding: what every tool does, and often enough"),
    (4, "brecq", "half the bytes: each block is rounded so that its outputs stay"),
    (3, "brecq", "where it still works; else see `r2 qat`, which trains"),
)


@command
def init(given: Inputs, written: InitOutput) -> Report:
    """Look at a network and its data, and write a recipe that quantizes it, with the commands that it stands for."""
    output = written.output
    if output.suffix != ".toml" or output.is_dir():
        raise InputError(f"--output {output} must be a file that ends in .toml")
    gates.require_free([output], overwrite=written.overwrite)

    from r2cli.api import inputs
    from r2cli.storage.atomic import write_atomically
    from r2cli.workflow import recipe as recipes

    if given.source is not None and given.source.suffix not in FILES:
        if given.model is not None:
            raise InputError(f"{given.source} and --model {given.model} are two networks: give one of them")
        if given.source.suffix in WEIGHTS:
            raise InputError(f"{given.source} holds weights alone: give FILE.py:FACTORY --weights {given.source}")
        given = replace(given, source=None, model=str(given.source))
    made, loaded = inputs.load(given, tell=console.note)
    about, options = _about(made, loaded), _options(given)
    steps = [recipes.Step("ptq", {**options, "weight-bits": bits, "method": method}, {}) for bits, method, _ in PLAN]
    lines = [recipes.shell(step, Path()) for step in steps]
    text = "\n".join(_recipe(output, about, options, lines, loaded.task.metric))
    report = {"command": "init", "output": output, "about": about, "lines": lines}
    if written.dry_run:
        console.tell([text], as_json=written.json)
        return report
    write_atomically(output, text.encode())
    told = [f"{output}: {about}", *(f"  {line}" for line in lines)]
    console.tell([*told, console.next_step("r2", "run", output)], as_json=written.json)
    return report


def _about(made: "Checkpoint", loaded: "datasets.Data") -> str:
    """The network and its data, in one line."""
    weights = {name: tensor for name, tensor in made.floats.items() if name.endswith("weight") and tensor.ndim > 1}
    count = sum(tensor.numel() for tensor in weights.values())
    metric = loaded.task.metric
    measured = f"measured by {metric.name}" if metric is not None else "measured in dB from the float network"
    counts = f"{len(loaded.train):,} samples to calibrate with and {len(loaded.test):,} to measure"
    return f"{made.origin}, {len(weights)} layers with {count:,} weights; {loaded.name}, {counts}, {measured}"


def _options(given: Inputs) -> dict[str, Any]:
    """What was given, by the names of the options of a step; files by their whole paths, since steps run elsewhere."""
    found: dict[str, Any] = {}
    for own in fields(given):
        value = getattr(given, own.name)
        if value != own.default:
            name = "source" if own.name == "source" else flag_of(own.name, own.metadata["option"]).strip("-")
            shown = _whole(value) if isinstance(value, Path | str) else value
            found[name] = [str(each) for each in shown] if isinstance(shown, list | tuple) else shown
    return found


def _whole(value: Path | str) -> str:
    """`value` with the whole path of the file or folder in it: FILE, FILE.py:NAME, or a kind of data and its place."""
    if isinstance(value, Path):
        return str(value.resolve())
    from r2cli.data import NOT_RECORDED  # the kinds whose place is a path

    first, colon, last = value.partition(":")
    if first.endswith(".py"):
        return f"{Path(first).resolve()}{colon}{last}"
    return f"{first}:{Path(last).resolve()}" if first in NOT_RECORDED and Path(last).exists() else value


def _recipe(
    output: Path, about: str, options: Mapping[str, Any], lines: list[str], metric: "metrics.Metric | None"
) -> Iterator[str]:
    """The lines of the recipe."""
    yield f"# {about}."
    line = shlex.join(["r2", "run", str(output)])
    yield f"# Run it with `{line}`: what is done already is not done again. It stands for these commands:"
    yield "#"
    yield from (f"#   {line}" for line in lines)
    yield ""
    yield "[matrix]"
    yield "plan = ["
    for bits, method, why in PLAN:
        yield f'    {{ name = "{bits} bits, {method}", bits = {bits}, method = "{method}" }},  # {why}'
    yield "]"
    yield "\n[[step]]"
    yield 'run = "ptq"'
    yield from (f"{name} = {json.dumps(value)}" for name, value in options.items())
    yield 'weight-bits = "{plan.bits}"'
    yield 'method = "{plan.method}"'
    yield 'output = "w{plan.bits}a8.safetensors"'
    yield "# max-drop = 1.0        # a gate: at most one point lost, or exit code 1"
    yield '# target = "openvino"   # where the file is to run: see `r2 targets`'
    yield '# keep = ["conv1=8"]    # layers that keep more bits'
    yield "\n[[table]]"
    yield f"title = {json.dumps(about.partition(',')[0])}"
    yield 'run = "ptq"'
    yield 'rows = ["plan"]'
    own = "" if metric is None else f"{metric.label} {metric.unit}".strip()
    named = {f"float {own}": "float_value", f"ONNX {own}": "metric.value"} if own else {}
    accuracy = "".join(f"{json.dumps(title)} = {json.dumps(key)}, " for title, key in named.items())
    rest = '"dB to float" = "float_sqnr_db", "bytes" = "bytes", "bits a weight" = "bits_per_weight", "proof" = "ticks"'
    yield f"metrics = {{ {accuracy}{rest} }}\n"
