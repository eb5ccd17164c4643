"""`r2 analyze` on large files: against reading them at all, and against the obvious torch code.

Two files are made, float32 and bfloat16, of 4096 x 4096 tensors of normal weights with some outliers, and read once so
that they are in the page cache. Then, each the least of some runs in turn, CPU time: `cat FILE >/dev/null`; the
obvious torch code for least, greatest, mean, standard deviation, kurtosis, 256 bins and outliers (whole tensors, by
safetensors); one bare pass of counting, the least that r2's method can take; the same statistics by r2 (`--quick`,
exact histogram and outliers); and everything that r2 analyzes, with rounding at five bit widths, per tensor and per
channel. Memory is the growth of the greatest resident size over the interpreter with torch and r2 loaded, in a process
of its own.

    python benchmarks/analyze.py --output benchmarks/analyze.md        # some minutes
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import r2cli
from r2cli import __version__

SIDE = 4096
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make(path: Path, dtype: torch.dtype, size: int) -> None:
    """A file of about `size` bytes of normal weights, 0.05 % of them six times as large."""
    count = max(1, size // (SIDE * SIDE * dtype.itemsize))
    generator = torch.Generator().manual_seed(0)
    w = 0.02 * torch.randn(SIDE, SIDE, generator=generator)
    w[torch.rand(SIDE, SIDE, generator=generator) < 5e-4] *= 6
    # The same weights in another order: making new ones would take longer than all that is measured.
    save_file({f"layers.{n}.weight": w.roll(n * 977, 0).to(dtype) for n in range(count)}, path)


def obvious(path: Path) -> None:
    """What one writes first."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            w = file.get_tensor(name).float()
            least, greatest = w.min(), w.max()
            z = (w - w.mean()) / w.std()
            (z**4).mean()
            torch.histc(w, 256, float(least), float(greatest))
            (z.abs() > 4).sum()


def cat(path: Path) -> None:
    subprocess.run(f"cat '{path}' > /dev/null", shell=True, check=True)


def bare(path: Path, dtype: torch.dtype) -> None:
    """The least that the method needs: one pass that counts 16-bit patterns, and for float32 extremes and moments too.

    What it takes here is what this machine allows. For float32 its outliers and histogram are inexact: a count of the
    upper halves cannot tell where in a bucket a value lies.
    """
    counts, extremes, moments = torch.zeros(1 << 16, dtype=torch.int64), [], [0.0] * 4
    buffer = torch.empty(1 << 16, dtype=dtype)
    patterns = buffer.view(torch.int16 if dtype.itemsize == 2 else torch.int32)
    target = patterns.numpy().data.cast("B")
    with path.open("rb", buffering=0) as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while read := file.readinto(target):
            x, bits = buffer[: read // dtype.itemsize], patterns[: read // dtype.itemsize]
            bits = (bits if dtype.itemsize == 2 else bits >> 16).int() & 0xFFFF
            counts += torch.bincount(bits, minlength=1 << 16)
            if dtype.itemsize == 4:
                square = x * x
                extremes.append(torch.aminmax(x))
                powers = (x.sum(), x.dot(x), x.dot(square), square.dot(square))
                moments = [m + float(power) for m, power in zip(moments, powers, strict=True)]


def ours(path: Path, *, quick: bool, threads: int = 1) -> None:
    r2cli.analyze(path, r2cli.AnalyzeConfig(quick=quick, threads=threads))


def cpu() -> float:
    """CPU time of this process and of those that it has waited for, in s: `os.times` counts hundredths, and `cat` of a
    small file takes none."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(own.ru_utime + own.ru_stime for own in used)


def least(runs: dict[str, tuple[Callable[[], None], int]]) -> dict[str, tuple[float, float]]:
    """The least CPU time and the least wall time of each, in s, of as many runs as it says, in turn."""
    best = dict.fromkeys(runs, (float("inf"), float("inf")))
    for turn in range(max(times for _, times in runs.values())):
        for name, (run, times) in runs.items():
            if turn < times:
                busy, start = cpu(), perf_counter()
                run()
                busy, wall = cpu() - busy, perf_counter() - start
                best[name] = min(best[name][0], busy), min(best[name][1], wall)
    return best


# A process of its own: the high-water mark of one that has made the files says nothing.
GROWTH = """
import sys
from pathlib import Path
import torch
import r2cli
torch.set_num_threads(1)
r2cli.analyze(sys.argv[2])
def resident(field):
    text = Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0]) / 1024
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
r2cli.analyze(sys.argv[1], r2cli.AnalyzeConfig(threads=int(sys.argv[3])))
print(resident("VmHWM") - before)
"""


def growth(path: Path, threads: int) -> float:
    """MB that the greatest resident size grows by."""
    small = path.with_name("small.safetensors")  # analyzed first, so that what r2 imports late is there
    save_file({"w": torch.zeros(64, 64)}, small)
    command = [sys.executable, "-c", GROWTH, str(path), str(small), str(threads)]
    return float(subprocess.run(command, capture_output=True, check=True).stdout)


def measure(kind: str, path: Path, dtype: torch.dtype) -> list[str]:
    """One line of the table."""
    cores = os.cpu_count() or 1
    times = least(
        {
            "cat": (lambda: cat(path), 5),
            "obvious": (lambda: obvious(path), 2),
            "bare": (lambda: bare(path, dtype), 3),
            "quick": (lambda: ours(path, quick=True), 3),
            "all": (lambda: ours(path, quick=False), 1),
            "quick, threads": (lambda: ours(path, quick=True, threads=cores), 2),
            "all, threads": (lambda: ours(path, quick=False, threads=cores), 1),
        }
    )
    told = [kind, f"{path.stat().st_size / 1e9:.2f}", f"{times['cat'][0]:.2f}", f"{times['obvious'][0]:.1f}"]
    for name in ("bare", "quick", "all"):
        own = times[name][0]
        told.append(f"{own:.2f}: {own / times['cat'][0]:.1f} x cat, {times['obvious'][0] / own:.1f} x faster")
        if name == "bare":
            continue
        told.append(f"{times[name][1] / times[f'{name}, threads'][1]:.2f} x")
    return [*told, f"{growth(path, 1):.0f} and {growth(path, cores):.0f} MB"]


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory of `r2 analyze` on large files.")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of each file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for kind, dtype in DTYPES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{kind}.safetensors"
            make(path, dtype, int(arguments.gigabytes * 1e9))
            rows.append(measure(kind, path, dtype))
    cores = os.cpu_count() or 1
    columns = ["file", "GB", "cat, s", "obvious torch, s", "bare count, s", "quick, s", f"{cores} threads"]
    columns += ["all, s", f"{cores} threads", f"memory, 1 and {cores} threads"]
    table = "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows])
    text = "\n\n".join(
        [
            "# `r2 analyze` on large files",
            f"{machine()}, {cores} cores with a load of {os.getloadavg()[1]:.1f}, files in the page cache; r2cli "
            f"{__version__}, torch {torch.__version__}. CPU time on one thread, the least of some runs in turn: other "
            "work on the machine falls on all, if not alike. *Bare count* is the least that the method needs, a count "
            "of 16-bit patterns (and for float32 extremes and moments) in one pass over 64 K values at a time, with "
            "outliers and histogram of float32 inexact: what this machine allows. *quick* is `r2 analyze --quick`, "
            "what the obvious code computes, with exact histograms and outliers; *all* rounds every weight at 8, 4, 3, "
            "2 and 1 bit as well, to min-max and best ranges, per tensor and per channel. Under threads: how much less "
            "wall time than on one. Memory: what the greatest resident size grows by over the interpreter with torch "
            "and r2 loaded, for *all*.",
            table,
        ]
    )
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
