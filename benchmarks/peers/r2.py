"""r2cli as the peers run: the same images, one process a cell, from the checkpoint to the ONNX file."""

import sys
from pathlib import Path

import torch
from common import Clock, Job, Made, main

import r2cli
from r2cli.storage import checkpoint
from r2cli.storage.checkpoint import InputSpec

sys.path.append(str(Path(__file__).parents[1]))
from given_images import data_of  # noqa: E402


def quantize(job: Job, clock: Clock) -> Made:
    made = checkpoint.load(Path(job.checkpoint))
    images = [torch.from_numpy(batch) for batch in job.batches()]
    # The file's accuracy is measured elsewhere, as the peers' is: one batch stands for the test images.
    test = [(images[0], torch.zeros(len(images[0]), dtype=torch.int64))]
    config = r2cli.PtqConfig(
        method=job.method,
        weight_bits=job.weight_bits,
        # `auto` may choose among grids where one per channel is allowed.
        granularity=None if job.method == "auto" and job.granularity == "channel" else job.granularity,
        calibration=0 if job.method == "dfq" else None,  # as `r2 ptq` has it, dfq looks at no image
        device="cpu",
    )
    assert isinstance(made.input, InputSpec), "a network of images"
    result = r2cli.quantize(made, data_of(made.input, made.class_names, images, test), config)
    own, chosen = result.settings, ""
    if job.method == "auto":
        chosen = f"{own.method}, {own.granularity}, {own.weight_range}, {' '.join(own.parts or ()) or 'no part of dfq'}"
    clock.lap("quantize")
    r2cli.export(result, job.output)
    clock.lap("export")
    return Made(chosen=chosen)


if __name__ == "__main__":
    main(quantize, "r2cli", "torch", "onnxruntime")
