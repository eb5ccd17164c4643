"""`r2 doctor`: what this machine has for r2, what is missing, and the command that mends it."""

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from time import perf_counter

from r2cli import __version__, console
from r2cli.cli.command import Report, command
from r2cli.config.groups import Listed
from r2cli.config.inspection import DoctorConfig
from r2cli.config.machine import usable_cores
from r2cli.errors import CheckFailed

EXTRAS = {  # what each one adds
    "timm": "a thousand networks more, by name",
    "text": "networks of transformers, and tokenizers",
    "openvino": "OpenVINO as a second engine in every proof",
    "tflite": "files of TensorFlow Lite, for Ethos-U too, proved in LiteRT",
    "metrics": "every metric of torchmetrics, by name",
    "test": "what r2's own tests need",
}
LEAST_SPACE = 1 << 30  # bytes that a large network's temporary files may take


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and what mends it. `fine` is None for what may be left out."""

    name: str
    fine: bool | None
    detail: str
    mend: str = ""


@command
def doctor(config: DoctorConfig, answer: Listed) -> Report:
    """Look at this machine: versions, processor, GPU, what each extra would add; and try a small network."""
    found = list(_looked(self_test=config.self_test))
    told = ["; ".join(filter(None, (each.detail, each.mend))) for each in found]
    lines = [console.tick(each.name, each.fine, text) for each, text in zip(found, told, strict=True)]
    report = {"command": "doctor", "findings": [asdict(each) for each in found]}
    console.tell([*lines, console.next_step("r2", "pretrain", "--reg", "margin")], as_json=answer.json)
    if wrong := [each.name for each in found if each.fine is False]:
        raise CheckFailed(f"r2 will not work here as it should: {', '.join(wrong)}", report)
    return report


def _looked(*, self_test: bool) -> Iterator[Finding]:
    """Look at one thing after the other."""
    yield Finding("r2", True, f"{__version__}, Python {platform.python_version()}, {platform.platform(terse=True)}")
    needed = list(_packages())
    yield from needed
    yield _temporary()
    if any(each.fine is False for each in needed):
        return
    yield from _processors()
    if self_test:
        yield tried()


def _packages() -> Iterator[Finding]:
    """What r2 needs, and what its extras do, each with its version."""
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    extras: dict[str, list[str]] = {}
    for text in requires("r2cli") or ():
        wanted = Requirement(text)
        extra = next((name for name in EXTRAS if wanted.marker and f'"{name}"' in str(wanted.marker)), None)
        if wanted.marker and extra is None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(wanted.name)
            short = "" if wanted.specifier.contains(found, prereleases=True) else f"{wanted.name} {found}"
        except PackageNotFoundError:
            found, short = "missing", wanted.name
        if extra is not None:
            extras.setdefault(extra, []).extend([short] if short else [])
        elif short:
            yield Finding(wanted.name, False, found, f"pip install '{wanted.name}{wanted.specifier}'")
        else:
            yield Finding(wanted.name, True, found)
    for extra, short_of in extras.items():
        about, mend = EXTRAS[extra], f"pip install 'r2cli[{extra}]'"
        yield Finding(f"[{extra}]", None if short_of else True, about, mend if short_of else "")


def _temporary() -> Finding:
    """The folder of temporary files."""
    place = tempfile.gettempdir()
    free = shutil.disk_usage(place).free
    few = free < LEAST_SPACE
    mend = "set TMPDIR to a folder with more space" if few else ""
    return Finding("temporary files", not few, f"{place}, {free / 2**30:.1f} GiB free", mend)


def _processors() -> Iterator[Finding]:
    """The processor with its threads, and the GPU."""
    import torch

    from r2cli.deploy import runtime

    threads = torch.get_num_threads()
    kind = f"{runtime.cpu()}, {usable_cores()} cores that this process may use, {threads} threads of torch"
    overflow = "" if runtime.has_vnni() else "8-bit sums may overflow here: r2 runs files exactly, see docs/deploy.md"
    yield Finding("processor", True, kind, overflow)
    if torch.cuda.is_available():
        yield Finding("GPU", True, torch.cuda.get_device_name())
    else:
        yield Finding("GPU", None, "none that torch can use: r2 trains on the processor")


def tried() -> Finding:
    """A small network of random weights, from torch to a proved integer file."""
    from r2cli import api, data, models
    from r2cli.config.methods import PtqConfig
    from r2cli.storage.atomic import scratch_folder

    started = perf_counter()
    try:
        source = data.load("digits:64", size=8)
        network = models.build(models.spec("resnet8", classes=source.classes, channels=1, size=8))
        with scratch_folder() as folder:
            made = api.quantize(network, source, PtqConfig(weight_bits=4))
            api.export(made, folder / "model.onnx")
            proof = api.verify(folder / "model.onnx", made, source, timed=False)
    except Exception as error:  # whatever it is, it is what the user wants to know
        if os.environ.get("R2_TRACEBACK"):
            raise
        return Finding("self-test", False, f"{type(error).__name__}: {error}", "R2_TRACEBACK=1 r2 doctor says where")
    wrong = [f"{each.name} ({each.detail})" for each in proof.checks if not each.passed]
    took = f"a small network was quantized to 4 bits and proved in {perf_counter() - started:.1f} s"
    return Finding("self-test", not wrong, "; ".join(wrong) or took)
