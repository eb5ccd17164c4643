"""Processes of the benchmarks beside this file, and virtual environments for peers, made where there are none."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path


def python_of(folder: Path, packages: Sequence[str]) -> Path | None:
    """The Python of an environment with `packages`; None, and why on standard error, where it cannot be made."""
    if reason := missing(folder, packages):
        print(f"{packages[0]} cannot be installed: {reason}", file=sys.stderr)
        return None
    return folder / "bin" / "python"


def missing(folder: Path, packages: Sequence[str]) -> str:
    """Make an environment with `packages` where there is none; why it cannot be made, or nothing."""
    python = folder / "bin" / "python"
    if python.exists():
        return ""
    venv.create(folder, with_pip=True)
    done = subprocess.run([python, "-m", "pip", "install", "-q", *packages], capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    shutil.rmtree(folder)  # the next run tries again
    return done.stderr.strip().splitlines()[-1]


def one(python: Path | str, script: str, *arguments: object, exact: bool = False) -> dict[str, float] | None:
    """What `script --one ARGUMENTS` prints, on one thread; None, and why on standard error, where it fails.

    `exact`: every large tensor is mapped by itself, so that memory has none of the allocator's leftovers.
    """
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **({"MALLOC_MMAP_THRESHOLD_": "65536"} if exact else {})}
    command = [str(python), script, "--one", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    if done.returncode:
        print(f"left out {arguments}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def images_per_second(options: Sequence[object], variables: Mapping[str, str], launcher: Sequence[str] = ()) -> float:
    """Of the last epoch of `python LAUNCHER -m r2cli pretrain OPTIONS`; ends this program where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "net.safetensors")
        command = [
            sys.executable,
            *launcher,
            "-m",
            "r2cli",
            "pretrain",
            *map(str, options),
            "--json",
            "-o",
            str(output),
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=dict(variables))
    if done.returncode:
        sys.exit(done.stderr)
    speed: float = json.loads(done.stdout)["epochs"][-1]["images_per_second"]
    return speed
