"""Arm's compiler for the Ethos-U, `vela`, where it is installed: what a .tflite file takes on the device."""

import csv
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from r2cli.errors import InputError, R2Error
from r2cli.storage.atomic import scratch_folder

ACCELERATOR = "ethos-u55-128"


def report(path: Path) -> dict[str, Any] | None:
    """What Vela says of the file at `path`: operators on the NPU and beside it, bytes, and cycles of one image.

    None where it is not installed. Raises R2Error where it fails.
    """
    if (command := _command()) is None:
        return None
    with scratch_folder() as folder:
        told = _compiled(command, path, folder)
        with _one(folder, "summary").open(encoding="utf-8") as file:
            row = next(csv.DictReader(file))
    on_cpu, on_npu = (int(count) for count in re.findall(r"^[CN]PU operators = (\d+)", told, re.MULTILINE))
    return {
        "accelerator": ACCELERATOR,
        "on_npu": on_npu,
        "on_cpu": on_cpu,
        "flash_bytes": _bytes(row["off_chip_flash_memory_used"]) + _bytes(row["on_chip_flash_memory_used"]),
        "sram_bytes": _bytes(row["sram_memory_used"]),
        "cycles": int(float(row["cycles_total"])),
    }


def cycles(path: Path) -> dict[str, float]:
    """The cycles of one image by what computes them: operators by the names of their results.

    Raises InputError where Vela is not installed, and R2Error where it fails.
    """
    if (command := _command()) is None:
        raise InputError("cycles of an Ethos-U need vela, which is not there: pip install ethos-u-vela")
    with scratch_folder() as folder:
        _compiled(command, path, folder)
        found: Counter[str] = Counter()
        with _one(folder, "per-layer").open(encoding="utf-8") as file:
            for row in csv.DictReader(file):
                found[row["Name"]] += round(float(row["Op Cycles"]))
    return dict(found)


def _command() -> str | None:
    return shutil.which("vela") or shutil.which("vela", path=str(Path(sys.executable).parent))


def _compiled(command: str, path: Path, folder: Path) -> str:
    """Compile the file, with all reports in `folder`. Returns what was told."""
    given = [command, str(path), "--output-dir", str(folder), "--accelerator-config", ACCELERATOR]
    ran = subprocess.run([*given, "--verbose-performance"], capture_output=True, text=True)
    if ran.returncode or not list(folder.glob("*_summary_*.csv")):
        told = (ran.stderr or ran.stdout).strip().splitlines() or ["it gave no report"]
        raise R2Error(f"vela cannot compile {path}: {told[-1]}")
    return ran.stdout


def _one(folder: Path, kind: str) -> Path:
    return next(folder.glob(f"*_{kind}*.csv"))


def _bytes(kibibytes: str) -> int:
    return round(1024 * float(kibibytes))
