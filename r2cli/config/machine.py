"""What of this machine a process may use, and what it is made of. It needs no torch."""

import os
import platform
from functools import cache
from importlib import metadata
from pathlib import Path

ARITHMETIC = {"avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm", "sve"}
LIBRARIES = ("torch", "onnx", "onnxruntime")


def usable_cores() -> int:
    """Return how many cores this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def processor_flags() -> frozenset[str]:
    """Return the instructions that the processor says it has, where the system tells: Linux does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":")[1] for line in lines if line.startswith(("flags", "Features"))), "").split())


def processor() -> str:
    """Return the kind of processor, and those of its instructions that decide what arithmetic the runtimes take."""
    return " ".join([platform.machine(), *sorted(ARITHMETIC & processor_flags())])


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide what a file holds and what it gives."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in LIBRARIES}}
