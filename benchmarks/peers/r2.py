"""r2cli as the peers run: the same images, one process a cell, from the checkpoint to the ONNX file."""

from pathlib import Path

import torch
from common import Clock, Job, Made, main

from r2cli import registry
from r2cli.deploy import onnx_export
from r2cli.ptq import auto, post_training
from r2cli.storage import checkpoint

CPU = torch.device("cpu")


def quantize(job: Job, clock: Clock) -> Made:
    made = checkpoint.load(Path(job.checkpoint))
    # As `r2 ptq` has it, dfq looks at no image.
    images = None if job.method == "dfq" else [torch.from_numpy(batch) for batch in job.batches()]
    rule = registry.usual_weight_range(job.method, job.weight_bits)
    settings = post_training.PtqSettings(job.method, job.weight_bits, 8, job.granularity, keep={}, weight_range=rule)
    chosen = ""
    if job.method == "auto":
        assert images is not None
        grids = auto.GRIDS if job.granularity == post_training.CHANNEL else (job.granularity,)
        coded, _, own, _ = auto.choose(made, settings, images, CPU, grids=grids)
        chosen = f"{own.method}, {own.granularity}, {own.weight_range}, {' '.join(own.parts or ()) or 'no part of dfq'}"
    else:
        coded, _ = post_training.quantize(made, settings, images, CPU)
    clock.lap("quantize")
    Path(job.output).write_bytes(onnx_export.to_bytes(coded))
    clock.lap("export")
    return Made(chosen=chosen)


if __name__ == "__main__":
    main(quantize, "r2cli", "torch", "onnxruntime")
