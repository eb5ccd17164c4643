"""What is tried before the work, so that it is named at once and not after hours of training: the file of a target, and
inputs of other sizes."""

import torch

from r2cli.calibration import sizes
from r2cli.config import targets
from r2cli.data import Split
from r2cli.deploy import onnx_export
from r2cli.ptq import post_training
from r2cli.ptq.post_training import PtqSettings
from r2cli.registry import PTQ_NEAREST
from r2cli.storage.checkpoint import Checkpoint


def rehearse(made: Checkpoint, name: str, shown: Split) -> None:
    """Raise InputError for what of the float network `made` has no form in the target's file, by its name, and where it
    cannot be calibrated on an input of `shown` for its size.

    ONNX has a form for nearly all, so this looks at TensorFlow Lite alone.
    """
    sizes.require_takes(made, shown)
    if targets.get(name).container != targets.TFLITE:
        return
    from r2cli.deploy import tflite_export

    settings = PtqSettings(PTQ_NEAREST, 8, 8, post_training.CHANNEL, {}, target=name)
    quantized, _ = post_training.quantize(made, settings, [made.input.blank(1)], torch.device("cpu"))
    tflite_export.to_bytes(onnx_export.to_bytes(quantized))
