"""What each layer of a network costs at each width: measured alone in ONNX Runtime, or told by Arm's Vela.

In ONNX Runtime a layer is a file of its own, with the input that it has in the network and a grid on what it gives, and
its cost is the microseconds of one image on one thread: those of all nodes but the first and the last, which put the
file's own input and result on grids. Layers that are alike are measured once. Vela's cost is the cycles of an image.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from r2cli.calibration import calibrate, deployed
from r2cli.config import layer_form, targets
from r2cli.config.layer_form import WIDE_BITS
from r2cli.deploy import onnx_export, runtime, tflite_export, vela
from r2cli.errors import InputError, R2Error
from r2cli.graph import equivalence, structure
from r2cli.ptq import post_training
from r2cli.ptq.post_training import PtqSettings
from r2cli.registry import PTQ_NEAREST
from r2cli.storage.atomic import scratch_folder
from r2cli.storage.checkpoint import Checkpoint, ModelSpec
from r2cli.storage.input_spec import TensorSpec, TensorsSpec, places

RUNS, WARM = 40, 5
CostRow = tuple[str, int | str, float]  # layer, width, cost
CPU = torch.device("cpu")


@torch.no_grad()
def measured(made: Checkpoint, target: str, widths: Sequence[str]) -> list[CostRow]:
    """The cost of every layer of the float network `made` at every width.

    Raises InputError for a target that nothing measures, and for a width that it has not.
    """
    forms = [layer_form.of(width) for width in widths]
    targets.require_forms(target, forms, act_bits=8)
    if target == targets.ETHOS_U:
        return list(_by_vela(made, widths))
    if target != targets.DEFAULT:
        raise InputError(f"--target {target} is measured by nothing here: give {targets.DEFAULT} or {targets.ETHOS_U}")
    return list(_alone(made, widths))


def _alone(made: Checkpoint, widths: Sequence[str]) -> Iterator[CostRow]:
    net = equivalence.read(deployed.network(made), made.input, deployed.architecture(made))
    structure.propagate(net, made.input.shape)
    known: dict[str, dict[str, float]] = {}
    for layer, module in structure.named_layers(net):
        read = structure.node_of(net, layer).all_input_nodes
        if not read:
            raise InputError(f"'{layer.name}' is a weight of a recurrent layer, which cannot be measured alone")
        shape = tuple(read[0].meta["tensor_meta"].shape[1:])
        alike = f"{module} {shape}"
        if alike not in known:
            known[alike] = {}
            for width in widths:
                known[alike][width] = _microseconds(module, shape, width)
        yield from ((layer.name, layer_form.of(width).word, cost) for width, cost in known[alike].items())


class _Alone(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x)


def _microseconds(module: nn.Module, shape: tuple[int, ...], width: str) -> float:
    """The time of one image, as the mean of the faster half of the runs."""
    template = _Alone(copy.deepcopy(module)).eval()
    spec = ModelSpec("layer", 0, factory=lambda: copy.deepcopy(template))
    given = TensorsSpec((TensorSpec("input", shape),))
    floats = {name: tensor.detach().clone() for name, tensor in template.state_dict().items()}
    made = Checkpoint(spec, given, (), floats, outputs=("output",))
    form, images = layer_form.of(width), given.random(2, torch.Generator().manual_seed(0))
    if not form.is_float:
        settings = PtqSettings(
            PTQ_NEAREST, form.weight_bits or 8, form.act_bits or 8, form.granularity or "channel", {}
        )
        made, _ = post_training.quantize(made, settings, [images], CPU)
        node = structure.layers(deployed.graph(made))[0].node
        low, high = map(float, torch.aminmax(template(*places(images))))
        grid = calibrate.activation_grid(low, high, max(8, min(WIDE_BITS, form.act_bits or 8)))
        made = replace(made, activations={**made.activations, node: grid})
    with scratch_folder() as folder:
        path = folder / "layer.onnx"
        path.write_bytes(onnx_export.to_bytes(made))
        runs = runtime.node_times(path, {"input": places(images)[0][:1].numpy()}, RUNS + WARM)[WARM:]
    times = sorted(sum(_own(run)) for run in runs)
    return sum(times[: RUNS // 2]) / (RUNS // 2)


def _own(run: Sequence[tuple[str, float]]) -> list[float]:
    """The times of a run without the grids of the file's input and result."""
    first = 1 if len(run) > 1 and run[0][0] == "QuantizeLinear" else 0
    last = len(run) - (1 if len(run) > 1 and run[-1][0] == "DequantizeLinear" else 0)
    return [time for _, time in run[first:last]]


def _by_vela(made: Checkpoint, widths: Iterable[str]) -> Iterator[CostRow]:
    for width in widths:
        form = layer_form.of(width)
        bits, acts = form.weight_bits or 8, form.act_bits or 8
        settings = PtqSettings(PTQ_NEAREST, bits, acts, form.granularity or "channel", {}, target=targets.ETHOS_U)
        images = made.input.random(2, torch.Generator().manual_seed(0)) if isinstance(made.input, TensorsSpec) else None
        images = made.input.blank(2) if images is None else images
        quantized, _ = post_training.quantize(made, settings, [images], CPU)
        with scratch_folder() as folder:
            path = Path(folder) / "network.tflite"
            path.write_bytes(tflite_export.to_bytes(onnx_export.to_bytes(quantized)))
            cycles = vela.cycles(path)
        net = deployed.graph(quantized)
        results = net.graph.output_node().all_input_nodes
        called = {node.name: name for node, name in zip(results, quantized.outputs, strict=False)}
        for layer in structure.layers(net):
            name = layer.node if layer.node in cycles else called.get(layer.node, "")
            if name not in cycles:
                raise R2Error(f"vela tells no cycles of '{layer.name}': measure it on the device, and write the table")
            yield layer.name, form.word, cycles[name]
