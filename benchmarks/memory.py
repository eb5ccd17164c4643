"""What this process holds in memory, and held at most: for the benchmarks beside this file. Linux only."""

import ctypes
from pathlib import Path


def mark(what: str) -> int:
    """Bytes that the process holds (VmRSS), or held at most since `forget` (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def forget() -> int:
    """Give free memory back, begin the high-water mark again; bytes that the process holds."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return mark("VmRSS")
