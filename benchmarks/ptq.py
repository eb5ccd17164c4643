"""What `r2 ptq` reaches beyond the grid of benchmarks/peers.md: memory, mixed precision, a network spread on purpose.

Every line is a command as a user would type it, in a process of its own with one thread; accuracy is the ONNX file's on
the whole test split, memory the greatest resident size of the process.

    python benchmarks/ptq.py resnet20-none.safetensors mobilenet-none.safetensors --data imagefolder:cifar10 \
        --work-dir ptq --output benchmarks/ptq.md

Results are JSON lines in the work directory: a run that was stopped goes on where it was.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PARTS = {
    "Memory: calibration keeps no activations": ("64 images", "4,096 images"),
    "Mixed precision: 3.2 bits a weight on average": ("all at 3", "3.2, hessian", "3.2, sqnr", "all at 4"),
    "Mixed precision under BRECQ": ("all at 3, brecq", "3.2, hessian, brecq"),
    "Channel ranges spread apart by exp(N(0, 1)), one grid for a tensor": (
        *("W8A8 nearest", "W8A8 dfq", "W4A8 nearest", "W4A8 dfq", "W4A8 auto"),
    ),
}
SPREAD = ("--granularity", "tensor")
CELLS: Mapping[str, Sequence[str]] = {
    "64 images": ("--calibration", "64"),
    "4,096 images": ("--calibration", "4096"),
    "all at 3": ("--weight-bits", "3"),
    "3.2, hessian": ("--target-bits", "3.2"),
    "3.2, sqnr": ("--target-bits", "3.2", "--sensitivity", "sqnr"),
    "all at 4": ("--weight-bits", "4"),
    "all at 3, brecq": ("--weight-bits", "3", "--method", "brecq", "--weight-range", "mse"),
    "3.2, hessian, brecq": ("--target-bits", "3.2", "--method", "brecq", "--weight-range", "mse"),
    "W8A8 nearest": SPREAD,
    "W8A8 dfq": (*SPREAD, "--method", "dfq"),
    "W4A8 nearest": (*SPREAD, "--weight-bits", "4"),
    "W4A8 dfq": (*SPREAD, "--weight-bits", "4", "--method", "dfq"),
    "W4A8 auto": (*SPREAD, "--weight-bits", "4", "--method", "auto"),
}
COLUMNS = ("network", "float", "cell", "options", "top-1 %", "drop", "bits a weight", "bytes", "s", "CPU s", "MB")


@dataclass(frozen=True)
class Ran:
    """What a command reported, and what its process took: seconds of wall time and of CPU, and MB."""

    report: Mapping[str, Any]
    cpu: float
    mb: float


def run(*arguments: str) -> Ran:
    """`r2 ARGUMENTS --json` in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "r2cli", *arguments, "--json"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        text = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"r2 {' '.join(arguments)} ended with {process.returncode}")
    return Ran(json.loads(text), used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def results(given: argparse.Namespace, there: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The cells that are not there yet."""
    done = {(record["network"], record["cell"]) for record in there}
    for source in given.checkpoint:
        spread = given.work_dir / f"{source.stem}-spread.safetensors"
        if not spread.exists():
            subprocess.run([sys.executable, HERE / "spread.py", source, spread], check=True, stdout=sys.stderr)
        for part, cells in PARTS.items():
            for cell in cells:
                if (source.stem, cell) in done or (part.startswith("Memory") and source != given.checkpoint[0]):
                    continue
                own = spread if part.startswith("Channel") else source
                output = given.work_dir / f"{source.stem}.{cell.replace(' ', '-')}.safetensors"
                data = () if "dfq" in cell else ("--data", given.data)
                ran = run("ptq", str(own), *CELLS[cell], *data, "--seed", "0", "-o", str(output), "--overwrite")
                report = ran.report
                if report["top1"] is None:
                    told = run("evaluate", str(output.with_suffix(".onnx")), "--data", given.data).report
                    report = {**report, "top1": told["top1"]}
                told = {name: report[name] for name in ("top1", "bytes", "bits_per_weight", "seconds")}
                yield {"network": source.stem, "cell": cell, **told, "cpu": round(ran.cpu, 1), "mb": round(ran.mb)}


def row(record: Mapping[str, Any], floats: Mapping[str, float]) -> list[str]:
    before = floats[record["network"]]
    forms = {"bits_per_weight": ".2f", "bytes": ",", "seconds": ".0f", "cpu": ".0f", "mb": ","}
    numbers = [format(record[name], form) for name, form in forms.items()]
    shown = (f"{record['top1']:.2f}", f"{before - record['top1']:.2f}")
    return [record["network"], f"{before:.2f}", record["cell"], " ".join(CELLS[record["cell"]]), *shown, *numbers]


def _place(record: Mapping[str, Any]) -> int:
    return list(CELLS).index(record["cell"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory, mixed precision and a spread network.")
    parser.add_argument("checkpoint", type=Path, nargs="+")
    parser.add_argument("--data", default="imagefolder:cifar10")
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    given.work_dir.mkdir(parents=True, exist_ok=True)
    lines, floats = given.work_dir / "results.jsonl", given.work_dir / "floats.json"
    known: dict[str, float] = json.loads(floats.read_text()) if floats.exists() else {}
    for source in given.checkpoint:
        if source.stem not in known:
            known[source.stem] = run("evaluate", str(source), "--data", given.data).report["top1"]
            floats.write_text(json.dumps(known))
    there = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    for record in results(given, there):
        print(json.dumps(record), file=sys.stderr)
        there.append(record)
        with lines.open("a") as file:
            file.write(json.dumps(record) + "\n")
    text = [
        f"# `r2 ptq`: memory, mixed precision, and a network spread on purpose\n\n{platform.machine()}, one thread."
    ]
    for part, cells in PARTS.items():
        chosen = [record for record in there if record["cell"] in cells]
        own = [row(each, known) for each in sorted(chosen, key=lambda r: (list(known).index(r["network"]), _place(r)))]
        table = "\n".join(f"| {' | '.join(each)} |" for each in [COLUMNS, ["---"] * len(COLUMNS), *own])
        text.append(f"## {part}\n\n{table}")
    print("\n\n".join(text))
    if given.output:
        given.output.write_text("\n\n".join(text) + "\n")


if __name__ == "__main__":
    main()
