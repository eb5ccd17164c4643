"""What is tried before the work, so that it is named at once and not after hours of training: the file of a target, and
inputs of other sizes."""

import torch
from torch._ops import OpOverload

from r2cli.calibration import deployed, sizes
from r2cli.config import targets
from r2cli.data import Split
from r2cli.deploy import onnx_export
from r2cli.deploy.onnx_operators import OPERATORS
from r2cli.deploy.onnx_sheet import UNKNOWN, refusal
from r2cli.errors import InputError
from r2cli.graph.constants import operator_name
from r2cli.graph.read import Unreadable, trace
from r2cli.ptq import post_training
from r2cli.ptq.post_training import PtqSettings
from r2cli.registry import PTQ_NEAREST
from r2cli.storage.checkpoint import Checkpoint


def rehearse(made: Checkpoint, name: str, shown: Split) -> None:
    """Raise InputError for what of the float network `made` has no form in the target's file, by its name, and where it
    cannot be calibrated on an input of `shown` for its size."""
    sizes.require_takes(made, shown)
    _require_known(made)
    if targets.get(name).container != targets.TFLITE:
        return
    from r2cli.deploy import tflite_export

    settings = PtqSettings(PTQ_NEAREST, 8, 8, post_training.CHANNEL, {}, target=name)
    quantized, _ = post_training.quantize(made, settings, [made.input.blank(1)], torch.device("cpu"))
    tflite_export.to_bytes(onnx_export.to_bytes(quantized))


def _require_known(made: Checkpoint) -> None:
    """Raise InputError for an operator that no file holds. Where no graph can be read, weights alone may do."""
    try:
        net = trace(deployed.network(made), made.input.blank(2), deployed.architecture(made))
    except Unreadable:
        return
    for node in net.graph.nodes:
        if isinstance(node.target, OpOverload) and node.target not in OPERATORS:
            raise InputError(refusal(node.name, operator_name(node.target), UNKNOWN))
