"""A virtual environment for a peer, made where there is none: for the benchmarks beside this file."""

import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path


def python_of(folder: Path, packages: Sequence[str]) -> Path | None:
    """The Python of an environment with `packages`; None, and why on standard error, where it cannot be made."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        done = subprocess.run([python, "-m", "pip", "install", "-q", *packages], capture_output=True, text=True)
        if done.returncode:
            print(f"{packages[0]} cannot be installed: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            return None
    return python
