"""aimet-onnx: nearest, cross-layer equalization, sequential MSE and AdaRound, each as its documentation applies it.

Everything that is not asked for is at its default: min-max ranges, asymmetric activations, the per-channel
configuration that "default" stands for, or the per-tensor one beside it in the package. The file is written by
`to_onnx_qdq` with weights as integers. It writes 4 and 8 bits; below, what it simulates is measured instead.
Its `equalize_model` is one pass of cross-layer scaling, then high-bias folding where the file still has BatchNorms
(what torch's exporter writes has none: it folds them itself). Bias correction is not part of it any more.
"""

from pathlib import Path
from typing import Any

import aimet_onnx
import onnx
import torch
from aimet_onnx.cross_layer_equalization import equalize_model
from common import Clock, Job, Made, main

PER_TENSOR = Path(aimet_onnx.__file__).parent / "common/quantsim_config/default_config.json"


def quantize(job: Job, clock: Clock) -> Made:
    torch.manual_seed(0)  # AdaRound draws its minibatches from torch
    model = onnx.load(job.model)
    inputs = [{"input": images} for images in job.batches()]
    if "cle" in job.method:
        equalize_model(model)
        clock.lap("equalize")
    sim = aimet_onnx.QuantizationSimModel(
        model,
        param_type=aimet_onnx.qtype.int(job.weight_bits),
        activation_type=aimet_onnx.qtype.int(job.act_bits),
        config_file="default" if job.granularity == "channel" else str(PER_TENSOR),
        session_options_kwargs={"intra_op_num_threads": 1},
    )
    clock.lap("prepare")
    if "seqmse" in job.method:
        aimet_onnx.apply_seq_mse(sim, inputs)
        clock.lap("seqmse")
    if "adaround" in job.method:
        steps = {} if job.steps is None else {"num_iterations": job.steps}
        aimet_onnx.apply_adaround(sim, inputs, **steps)
        clock.lap("round")
    sim.compute_encodings(inputs)
    clock.lap("calibrate")

    def simulate(images: Any) -> Any:
        return sim.session.run(None, {"input": images})[0]

    try:
        onnx.save(sim.to_onnx_qdq(prequantize_constants=True), job.output)
    except RuntimeError as error:
        return Made(simulate, str(error))
    clock.lap("export")
    return Made()


if __name__ == "__main__":
    main(quantize, "aimet-onnx", "onnxruntime", "onnx", "torch")
