"""ONNX Runtime's `quantize_static` with its own pre-processing: QDQ, uint8 activations, min-max ranges."""

from collections.abc import Mapping
from typing import Any

from common import Clock, Job, Made, Refused, main
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, job: Job) -> None:
        self.batches = iter(job.batches())

    def get_next(self) -> Mapping[str, Any] | None:
        images = next(self.batches, None)
        return None if images is None else {"input": images}


def quantize(job: Job, clock: Clock) -> Made:
    kind = getattr(QuantType, f"QInt{job.weight_bits}", None)
    if kind is None:
        raise Refused(f"quantize_static has no weight type of {job.weight_bits} bits")
    if job.act_bits != 8:
        raise Refused(f"quantize_static's activations have 8 bits, not {job.act_bits}")
    prepared = f"{job.output}.prepared"
    quant_pre_process(job.model, prepared)
    clock.lap("prepare")
    quantize_static(
        prepared,
        job.output,
        Reader(job),
        quant_format=QuantFormat.QDQ,
        per_channel=job.granularity == "channel",
        activation_type=QuantType.QUInt8,
        weight_type=kind,
    )
    clock.lap("quantize")
    return Made()


if __name__ == "__main__":
    main(quantize, "onnxruntime", "onnx")
