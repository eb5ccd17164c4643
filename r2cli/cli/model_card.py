"""`--card FILE.md`: the page that tells people what an ONNX file is and how to feed it, as Hugging Face shows it.

All of it comes from the file and from the report of the command: nothing here is measured.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r2cli.cli.reports import cell
from r2cli.config import machine, targets
from r2cli.config.groups import ModelWritten
from r2cli.console import escaped
from r2cli.errors import InputError
from r2cli.storage import atomic
from r2cli.storage.input_spec import InputSpec

if TYPE_CHECKING:
    from r2cli.deploy.declared_inputs import Declared
    from r2cli.storage.input_spec import NetworkInput

Report = Mapping[str, Any]

# Hugging Face's names of metrics, and of what networks are for.
METRICS = {"top1": "accuracy", "top5": "accuracy", "miou": "mean_iou", "auroc": "roc_auc", "r2": "r_squared"}
OF_CLASSES = (None, "top1", "top5", "f1", "auroc")
OF_IMAGES = {"miou": "image-segmentation", "psnr": "image-to-image"}
ALL_FLOAT = {True: "What the layers read and give: only the weights are integers.", False: "All of it."}
SHOWN = 20  # classes that are listed


def require(written: ModelWritten, file: Path | None) -> None:
    """Raises InputError, before any work, where --card has no .onnx `file` to tell of, or cannot be written."""
    path, resumes = written.card, getattr(written, "resume", False)
    if path is None:
        return
    if file is None or file.suffix != f".{targets.ONNX}":
        raise InputError(f"--card {path} tells how to feed an .onnx file, and none is written: leave it out")
    if path.is_dir() or path.suffix != ".md":
        raise InputError(f"--card {path} must end in .md, as README.md does")
    if path.exists() and not (written.overwrite or resumes):
        raise InputError(f"{path} is there already: give --overwrite to replace it, or another --card")
    if not written.dry_run:
        atomic.Draft(path).discard()  # raises R2Error where the folder cannot be written


def write(written: ModelWritten, file: Path, report: Report, line: str) -> None:
    """Write the card of `file`, where one is asked for. One that is there, which people may have edited, is kept
    unless --overwrite is given.
    """
    path = written.card
    if path is not None and (written.overwrite or not path.exists()):
        atomic.write_atomically(path, text(file, report, line).encode())


def text(file: Path, report: Report, line: str) -> str:
    """The card of `file`, which the command `line` wrote and told of in `report`."""
    from r2cli.deploy import declared_inputs, runtime

    told, model = runtime.recorded(file), runtime.opened(file)
    inputs, outputs = declared_inputs.declared(model, str(file)), [each.name for each in model.graph.output]
    network = json.loads(next((each.value for each in model.metadata_props if each.key == "r2.model"), "{}"))
    named = cell(network.get("name", file.stem))
    kind = _pipeline(told.input, told.class_names, report)
    bits = f"{report['bits_per_weight']:.2f} bits a weight"
    codes = bool(report.get("integer_share"))
    on_grids = codes and any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    on = report.get("measured_on") or {"samples": report.get("samples"), "data": told.data}
    what = f"integer weights, {bits}" if codes else "float32 weights"
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions().items())
    parts = [
        _front(file, report, kind, on["data"], codes),
        f"# {cell(file.stem)}",
        f"`{named}` as an ONNX file of {report['bytes']:,} bytes with {what}, made by r2.",
        "## How it was made",
        f"```sh\n{escaped(line)}\n```",
        f"With {versions}.",
        "## How good it is",
        "\n".join(_facts(report, on)),
        "## What stays float",
        "\n".join(_floats(report)) or ("Nothing: every layer runs on integers." if on_grids else ALL_FLOAT[codes]),
        "## How to feed it",
        "\n".join(_inputs(inputs, outputs, told.input)),
        f"```python\n{_snippet(file.name, inputs, outputs, told.input, decides=_decides(kind))}\n```",
    ]
    if told.class_names:
        more = f", … ({len(told.class_names)} in all)" if len(told.class_names) > SHOWN else ""
        listed = ", ".join(cell(name) for name in told.class_names[:SHOWN])
        parts.append(f"Classes, in the order of the logits: {listed}{more}.")
    return "\n\n".join(parts) + "\n"


def _pipeline(given: "NetworkInput", classes: Sequence[str], report: Report) -> str | None:
    """Hugging Face's word for what the network does, where it is known."""
    metric = (report.get("metric") or {}).get("name")
    if not isinstance(given, InputSpec):
        return None
    if classes and metric in OF_CLASSES:
        return "text-classification" if given.is_text else "image-classification"
    return None if given.is_text else OF_IMAGES.get(metric or "")


def _decides(kind: str | None) -> bool:
    return kind is not None and kind.endswith("classification")


def _front(file: Path, report: Report, kind: str | None, data: str, codes: bool) -> str:
    """The front matter, in YAML: texts are in quotes, as JSON has them, so that no name can say anything else."""
    tags = ["onnx", "onnxruntime", "r2", *(["quantized", "integer"] if codes else [])]
    lines = ["---", "library_name: onnx", *([f"pipeline_tag: {kind}"] if kind else []), "tags:"]
    lines += [f"- {tag}" for tag in tags]
    metric = report.get("metric")
    if metric and math.isfinite(metric["value"]):
        own = _quoted(METRICS.get(metric["name"], metric["name"]))
        lines += ["metrics:", f"- {own}", "model-index:", f"- name: {_quoted(file.stem)}", "  results:"]
        lines += ["  - task:", f"      type: {kind or 'other'}"]
        lines += ["    dataset:", f"      name: {_quoted(data)}", f"      type: {_quoted(data)}", "      split: test"]
        lines += ["    metrics:", f"    - type: {own}", f"      value: {metric['value']!r}"]
        lines += [f"      name: {_quoted(metric['label'])}"]
    return "\n".join([*lines, "---"])


def _quoted(text: str) -> str:
    return json.dumps(escaped(text), ensure_ascii=False)


def _facts(report: Report, on: Mapping[str, Any]) -> list[str]:
    """Accuracy, size, speed and proof, as rows of a table."""
    metric, before = report.get("metric"), report.get("float_value")
    rows = []
    if metric:
        value = metric["shown"].removeprefix(metric["label"]).strip()
        rows.append((f"{metric['label']} on {on['samples']} samples of {on['data']}", value))
        if before is not None:
            rows.append((f"{metric['label']} of the float network", f"{before:{'.2f' if metric['unit'] else '#.4g'}}"))
    if report.get("float_sqnr_db") is not None:
        rows.append(("outputs beside the float network's", f"{report['float_sqnr_db']:.1f} dB"))
    rows += [("bytes", f"{report['bytes']:,}"), ("bits a weight", f"{report['bits_per_weight']:.2f}")]
    if report.get("latency_ratio") is not None:
        rows.append((f"time, of float32's, on {report['cpu']}", f"{report['latency_ratio']:.2f}"))
    failed = [each["name"] for each in report["checks"] if not each["passed"]]
    rows.append(("proof", f"failed: {', '.join(failed)}" if failed else f"{len(report['checks'])} checks passed"))
    return ["| | |", "| --- | --- |", *(f"| {cell(name)} | {cell(value)} |" for name, value in rows)]


def _floats(report: Report) -> Iterator[str]:
    """What is no integer, with the reason: operations, and weights that are not among them."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for each in report.get("float_operations", ()):
        kinds.setdefault((each["kind"], each["reason"]), []).append(each["node"])
    for (kind, reason), nodes in kinds.items():
        more = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
        yield f"- {cell(kind)} ({cell(nodes[0])}{more}): {cell(reason)}"
    for each in report.get("float_weights", ()):
        yield f"- the weight {cell(each['name'])}, {each['bytes']:,} bytes"


def _inputs(inputs: Sequence["Declared"], outputs: Sequence[str], given: "NetworkInput") -> list[str]:
    """A row for each input, the names of outputs, and what is done with an image or a text before."""
    lines = ["| input | shape | type |", "| --- | --- | --- |"]
    for each in inputs:
        shape = " x ".join(str(axis or "any") for axis in each.axes)
        lines.append(f"| {cell(each.name)} | {cell(shape)} | {each.kind} |")
    lines += ["", f"It gives {', '.join(map(cell, outputs))}."]
    if not isinstance(given, InputSpec):
        return lines
    mean, std = (", ".join(map(str, values)) for values in (given.mean, given.std))
    pixels = f"Pixels from 0 to 1, less the mean ({mean}), over the standard deviation ({std})."
    tokens = "The three channels of a text: the ids of its tokens, the attention mask, and the token types."
    return [*lines, "", tokens if given.is_text else pixels]


def _snippet(
    name: str, inputs: Sequence["Declared"], outputs: Sequence[str], given: "NetworkInput", *, decides: bool
) -> str:
    """Lines of Python that run the file: on the picture image.png, or on zeros for other inputs."""
    from r2cli.deploy.runtime import EXACT_PRODUCTS

    image = given if isinstance(given, InputSpec) and not given.is_text else None
    lines = ["import numpy as np", "import onnxruntime as ort", *(["from PIL import Image"] if image else []), ""]
    lines += ["options = ort.SessionOptions()"]
    lines += [f'options.add_session_config_entry("{EXACT_PRODUCTS}", "1")  # exact on every processor']
    lines += [f'session = ort.InferenceSession({name!r}, options, providers=["CPUExecutionProvider"])', ""]
    if image is not None:
        times = f".repeat({inputs[0].axes[0]}, 0)" if isinstance(inputs[0].axes[0], int) else ""
        batch = f"pixels.transpose(2, 0, 1)[None]{times}"
        lines += [*_picture(image), f"inputs = {{{inputs[0].name!r}: {batch}}}"]
    else:
        lines += ["inputs = {  # your own arrays in the place of these"]
        for each in inputs:
            shape = tuple(axis if isinstance(axis, int) else 1 for axis in each.axes)
            lines.append(f"    {each.name!r}: np.zeros({shape}, np.{each.kind}),")
        lines += ["}"]
    lines += [f"results = dict(zip({list(outputs)!r}, session.run(None, inputs)))"]
    shown = f"results[{outputs[0]!r}].argmax(1)" if decides else "{name: each.shape for name, each in results.items()}"
    return "\n".join([*lines, f"print({shown})"])


def _picture(given: InputSpec) -> list[str]:
    """`pixels` (height, width, channels) of image.png, as r2 prepares a picture that comes as a file."""
    height, width = given.sides
    lines = [f'image = Image.open("image.png").convert({"L" if given.channels == 1 else "RGB"!r})']
    if given.width:
        lines += [f"image = image.resize(({width}, {height}), Image.Resampling.BILINEAR)"]
    else:
        lines += [
            f"sides = [int({given.resize} * side / min(image.size)) for side in image.size]",
            "image = image.resize(sides, Image.Resampling.BILINEAR)",
            f"left, top = round((image.width - {width}) / 2), round((image.height - {height}) / 2)",
            f"image = image.crop((left, top, left + {width}, top + {height}))",
        ]
    return [
        *lines,
        f"pixels = np.asarray(image, np.float32).reshape({height}, {width}, {given.channels}) / 255",
        f"pixels = (pixels - np.float32({list(given.mean)})) / np.float32({list(given.std)})",
    ]
