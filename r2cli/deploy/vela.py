"""Arm's compiler for the Ethos-U, `vela`, where it is installed: what a .tflite file takes on the device."""

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from r2cli.errors import R2Error
from r2cli.storage.atomic import scratch_folder

ACCELERATOR = "ethos-u55-128"


def report(path: Path) -> dict[str, Any] | None:
    """What Vela says of the file at `path`: operators on the NPU and beside it, bytes, and cycles of one image.

    None where it is not installed. Raises R2Error where it fails.
    """
    command = shutil.which("vela") or shutil.which("vela", path=str(Path(sys.executable).parent))
    if command is None:
        return None
    with scratch_folder() as folder:
        given = [command, str(path), "--output-dir", str(folder), "--accelerator-config", ACCELERATOR]
        ran = subprocess.run(given, capture_output=True, text=True)
        summaries = list(folder.glob("*_summary_*.csv"))
        if ran.returncode or not summaries:
            told = (ran.stderr or ran.stdout).strip().splitlines() or ["it gave no report"]
            raise R2Error(f"vela cannot compile {path}: {told[-1]}")
        with summaries[0].open(encoding="utf-8") as file:
            row = next(csv.DictReader(file))
    on_cpu, on_npu = (int(count) for count in re.findall(r"^[CN]PU operators = (\d+)", ran.stdout, re.MULTILINE))
    return {
        "accelerator": ACCELERATOR,
        "on_npu": on_npu,
        "on_cpu": on_cpu,
        "flash_bytes": _bytes(row["off_chip_flash_memory_used"]) + _bytes(row["on_chip_flash_memory_used"]),
        "sram_bytes": _bytes(row["sram_memory_used"]),
        "cycles": int(float(row["cycles_total"])),
    }


def _bytes(kibibytes: str) -> int:
    return round(1024 * float(kibibytes))
