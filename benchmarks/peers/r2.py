"""r2cli as the peers run: the same images, one process a cell, from the checkpoint to the ONNX file."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from common import Clock, Job, Made, main

import r2cli
from r2cli.models import own
from r2cli.storage import checkpoint
from r2cli.storage.checkpoint import InputSpec

sys.path.append(str(Path(__file__).parents[1]))
from given_images import data_of  # noqa: E402

QDROP = "+qdrop"


def quantize(job: Job, clock: Clock) -> Made:
    made = checkpoint.load(Path(job.checkpoint))
    if job.code:
        made = replace(made, model=replace(made.model, factory=own.factory(job.code)))
    images = [torch.from_numpy(batch) for batch in job.batches()]
    # The file's accuracy is measured elsewhere, as the peers' is: one batch stands for the test images.
    test = [(images[0], torch.zeros(len(images[0]), dtype=torch.int64))]
    config = r2cli.PtqConfig(
        method=job.method.removesuffix(QDROP),
        qdrop=job.method.endswith(QDROP),
        weight_bits=job.weight_bits,
        act_bits=job.act_bits,
        keep=job.keep,
        # `auto` may choose among grids where one per channel is allowed.
        granularity=None if job.method == "auto" and job.granularity == "channel" else job.granularity,
        calibration=0 if job.method == "dfq" else None,  # as `r2 ptq` has it, dfq looks at no image
        device="cpu",
    )
    assert isinstance(made.input, InputSpec), "a network of images"
    result = r2cli.quantize(made, data_of(made.input, made.class_names, images, test), config)
    settings, chosen = result.settings, ""
    if job.method == "auto":
        parts = " ".join(settings.parts or ()) or "no part of dfq"
        chosen = f"{settings.method}, {settings.granularity}, {settings.weight_range}, {parts}"
    clock.lap("quantize")
    r2cli.export(result, job.output)
    clock.lap("export")
    return Made(chosen=chosen)


if __name__ == "__main__":
    main(quantize, "r2cli", "torch", "onnxruntime")
