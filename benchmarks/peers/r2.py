"""r2cli as the peers run: the same images, one process a cell, from the checkpoint to the ONNX file."""

from pathlib import Path

import torch
from common import Clock, Job, Made, main

from r2cli import checkpoint, export, ptq


def quantize(job: Job, clock: Clock) -> Made:
    made = checkpoint.load(Path(job.checkpoint))
    images = [torch.from_numpy(batch) for batch in job.batches()]
    settings = ptq.Settings(job.method, job.weight_bits, 8, job.granularity, keep={})
    coded, _ = ptq.quantize(made, settings, images, torch.device("cpu"))
    clock.lap("quantize")
    Path(job.output).write_bytes(export.to_bytes(coded))
    clock.lap("export")
    return Made()


if __name__ == "__main__":
    main(quantize, "r2cli", "torch", "onnxruntime")
