"""aimet-onnx: automatic mixed precision, with the curve that its own search walks along.

Weights of 8, 4, 3 and 2 bits beside activations of 8. Sensitivities are by SQNR on the calibration images, as its
documentation shows it, and ranges of least error for weights ("tf-enhanced") or of all values ("min_max"). The search
is asked for its whole curve, and the first point within each budget is measured on the test images, in AIMET's
simulation: below 4 bits it writes no files.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import aimet_onnx
import numpy as np
import onnx
import torch
from aimet_onnx.amp.mixed_precision_algo import EvalCallbackFactory
from aimet_onnx.batch_norm_fold import fold_all_batch_norms_to_weight
from aimet_onnx.common.amp.utils import AMPSearchAlgo
from aimet_onnx.common.defs import CallbackFunc, QuantizationDataType
from aimet_onnx.mixed_precision import choose_mixed_precision
from common import BATCH, top1

INT = QuantizationDataType.int
CANDIDATES = [((8, INT), (bits, INT)) for bits in (8, 4, 3, 2)]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    calibration, images, labels = (np.load(job[name]) for name in ("calibration", "images", "labels"))
    budgets = list(job["budgets"])
    batches = torch.utils.data.DataLoader(calibration, batch_size=BATCH, collate_fn=np.stack)
    model = onnx.load(job["model"])
    fold_all_batch_norms_to_weight(model)
    sizes = {held.name: int(np.prod(held.dims)) for held in model.graph.initializer if len(held.dims) > 1}
    sim = aimet_onnx.QuantizationSimModel(
        model, quant_scheme=job["scheme"], session_options_kwargs={"intra_op_num_threads": 1}
    )

    def logits(session: Any, batch: Any) -> Any:
        return session.run(None, {"input": batch})[0]

    def calibrate(session: Any, _: Any) -> None:
        for batch in batches:
            logits(session, batch)

    sensitivity, started = EvalCallbackFactory(batches, logits).sqnr(sim), []

    def noticed(session: Any, more: Any) -> float:
        started.append(True)
        return float(sensitivity.func(session, more))

    def measured(session: Any, _: Any) -> float:
        """Top-1 on the test images: of each candidate for all layers, and on the curve of the first within a budget."""
        quantizers = {name: each for name, each in sim.qc_quantize_op_dict.items() if name in sizes and each.enabled}
        count = sum(sizes[name] for name in quantizers) or 1
        bits = sum(sizes[name] * each.bitwidth for name, each in quantizers.items()) / count
        if started and not any(budget >= bits for budget in budgets):
            return 0.0  # the whole curve is asked for, so that no score decides
        reached = top1(lambda part: logits(session, part), images, labels)
        if started:
            print(json.dumps({"bits": bits, "top1": reached}), flush=True)
            budgets[:] = [budget for budget in budgets if budget < bits]
        return reached

    with tempfile.TemporaryDirectory() as folder:
        choose_mixed_precision(
            sim,
            CANDIDATES,
            eval_callback_for_phase1=CallbackFunc(noticed),
            eval_callback_for_phase2=CallbackFunc(measured),
            allowed_accuracy_drop=None,
            results_dir=folder,
            clean_start=True,
            forward_pass_callback=CallbackFunc(calibrate),
            use_all_amp_candidates=True,
            amp_search_algo=AMPSearchAlgo.BruteForce,
        )


if __name__ == "__main__":
    main()
