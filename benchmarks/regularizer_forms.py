"""Other forms of range regularization: when it is on, what range it asks for, and which weights it looks at.

The default network, MobileNet-V1 0.25, on the embedded digits, trained as `r2 pretrain` does, with a penalty that this
file adds. Each is then rounded to the nearest level at 4, 3 and 2 bits, and by BRECQ at 2; accuracy is torch's on the
597 test scans, with 8 bits of activations.

    shipped      L-inf, margin and plain clipping at 1.5 standard deviations
    when         margin in the second half alone; off in the last quarter; stronger while the rate is high
    for bits     what lies beyond the range that has the least squared error for normal weights on 2**bits levels is
                 drawn in, and nothing else: the range is not learned
    folded       L-inf of what is deployed, the weight times its BatchNorm's factor: of the whole tensor, or the mean of
                 those of its channels

    python benchmarks/regularizer_forms.py --work-dir forms --output benchmarks/regularizer_forms.md

One JSON file for a form and seed: a run that was stopped goes on where it was.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import cos, pi
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from onnx_speed import machine, table
from torch import Tensor, nn

import r2cli
from r2cli import __version__, data, registry
from r2cli.api import weights
from r2cli.calibration import deployed
from r2cli.config.groups import Preparation
from r2cli.data.metrics import Measured
from r2cli.deploy import runtime
from r2cli.storage.checkpoint import Checkpoint
from r2cli.train import loop, pretraining
from r2cli.train.evaluation import of_task
from r2cli.train.hooks import Progress, TrainHooks
from r2cli.train.range_penalties import RegularizerSpec
from r2cli.train.regularizers import Regularizer, regularized

# The end of the range of least squared error for a normal density of deviation 1, on evenly spaced levels (Max 1960).
ENDS = {4: 2.51, 3: 2.05, 2: 1.49}
HALF, LAST_QUARTER = 0.5, 0.75
CPU = torch.device("cpu")
NETWORK, RATE = "mobilenet_v1", 0.1  # that of `r2 pretrain`


Penalty = Callable[[float], None]  # adds to the gradients, given the share of the training that is done


@dataclass(frozen=True)
class Form:
    """What is trained with `reg`, or with the penalty that `penalty` makes for a network."""

    name: str
    reg: str = "none"
    penalty: Callable[[nn.Module], Penalty] | None = None
    weight: float | None = None


def margin_while(on: Callable[[float], float]) -> Callable[[nn.Module], Penalty]:
    """Margin with `on(share)` times its usual strength, where `share` of the training is done. M stays at two
    deviations until it is on."""
    strength = registry.default_strength("margin", size=16, images=1200, is_text=False)

    def of(model: nn.Module) -> Penalty:
        made = Regularizer(RegularizerSpec("margin", strength), model)
        optimizer = torch.optim.SGD(made.parameters.values(), RATE, momentum=0.9, nesterov=True)

        def add(share: float) -> None:
            if on(share):
                made.setting = replace(made.setting, strength=strength * on(share))
                made.add_gradients()
                optimizer.param_groups[0]["lr"] = RATE * (1 + cos(pi * share)) / 2
                optimizer.step()

        return add

    return of


def for_bits(bits: int, strength: float = 0.03) -> Callable[[nn.Module], Penalty]:
    """strength * sum max(|w| - end, 0), where `end` is of the layer's own deviation, which is no part of it."""

    def of(model: nn.Module) -> Penalty:
        own = list(regularized(model).values())

        @torch.no_grad()
        def add(share: float) -> None:
            for w in own:
                assert w.grad is not None
                w.grad.add_(torch.sign(w) * (w.abs() > ENDS[bits] * w.square().mean().sqrt()), alpha=strength)

        return add

    return of


def folded(*, channels: bool, strength: float) -> Callable[[nn.Module], Penalty]:
    """strength * max |w g|, where g is gamma / sqrt(var + eps) of the BatchNorm behind: of all, or the mean over the
    channels. Gradients reach the weight and gamma."""

    def of(model: nn.Module) -> Penalty:
        modules = list(model.modules())
        pairs = [
            (first, second if isinstance(second, nn.BatchNorm2d) else None)
            for first, second in zip(modules, [*modules[1:], None], strict=True)
            if isinstance(first, nn.Conv2d | nn.Linear)
        ]

        def add(share: float) -> None:
            total: Tensor = torch.zeros(())
            for layer, norm in pairs:
                w = layer.weight.flatten(1)
                if norm is not None:
                    assert norm.running_var is not None
                    w = w * (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None]
                total = total + (w.abs().amax(1).mean() if channels else w.abs().amax())
            (strength * total).backward()

        return add

    return of


FORMS = [
    Form("none"),
    Form("L-inf", "linf"),
    Form("margin", "margin"),
    Form("clip at 1.5 std", "clip", weight=1.5),
    Form("margin, second half", penalty=margin_while(lambda share: float(share >= HALF))),
    Form("margin, off in the last quarter", penalty=margin_while(lambda share: float(share < LAST_QUARTER))),
    Form("margin, strength by the rate", penalty=margin_while(lambda share: 1 + cos(pi * share))),
    Form("for 3 bits", penalty=for_bits(3)),
    Form("for 2 bits", penalty=for_bits(2)),
    Form("L-inf, folded, tensor", penalty=folded(channels=False, strength=0.01)),
    Form("L-inf, folded, channels", penalty=folded(channels=True, strength=0.1)),
]
CELLS: Mapping[str, r2cli.PtqConfig] = {
    "W4 nearest, tensor": r2cli.PtqConfig(weight_bits=4, granularity="tensor"),
    "W3 nearest, as trained": r2cli.PtqConfig(weight_bits=3, granularity="unfolded"),
    "W3 nearest, tensor": r2cli.PtqConfig(weight_bits=3, granularity="tensor"),
    "W3 nearest, channel": r2cli.PtqConfig(weight_bits=3),
    "W2 nearest, channel": r2cli.PtqConfig(weight_bits=2),
    "W2 brecq, tensor": r2cli.PtqConfig(weight_bits=2, granularity="tensor", method="brecq"),
    "W2 brecq, channel": r2cli.PtqConfig(weight_bits=2, method="brecq"),
}


def trained(form: Form, source: data.Data, seed: int, folder: Path) -> Checkpoint:
    """The float network, as `r2 pretrain --seed` trains it with the penalty of `form`."""
    config = r2cli.PretrainConfig(reg=form.reg, reg_weight=form.weight, seed=seed)
    spec = weights.model_spec(Preparation(), NETWORK, source)
    run = pretraining.ready(spec, source, config, recorded={"data": source.name})
    network = pretraining.network_of(run)
    if form.penalty is None:
        return pretraining.train(run, network, folder / "state.safetensors").checkpoint
    steps = config.epochs * loop.steps_per_epoch(len(source.train), config.batch_size)
    penalty, done = form.penalty(network), [0]

    def step() -> None:
        penalty(done[0] / steps)
        done[0] += 1

    hooks = TrainHooks({"form": form.name}, add_gradients=step)
    watch = Progress(lambda count: None, lambda epoch: None)
    state = folder / "state.safetensors"
    state.unlink(missing_ok=True)
    loop.fit(network, source, run.settings, device=CPU, setting=hooks, state=state, resume=False, watch=watch)
    floats = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    made = Checkpoint(spec, source.input, source.class_names, floats, outputs=("logits",))
    return made.then("pretrain", {"data": "digits", "form": form.name}, {})


def top1(network: nn.Module, source: data.Data) -> float:
    found = of_task(network, source, CPU)
    assert isinstance(found, Measured) and found.top1 is not None
    return found.top1


def measured(form: Form, source: data.Data, seed: int, folder: Path) -> dict[str, float]:
    made = trained(form, source, seed, folder)
    ratios = [float(w.abs().max() / w.std()) for name, w in made.floats.items() if w.ndim > 1]
    found = {"float": top1(deployed.network(made), source), "max|w|/std": mean(ratios)}
    for name, config in CELLS.items():
        found[name] = top1(deployed.network(r2cli.quantize(made, source, config).checkpoint), source)
    return found


def shown(values: list[float]) -> str:
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description="Forms of range regularization on digits.")
    parser.add_argument("--work-dir", type=Path, default=Path("forms"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    source = data.load("digits")
    found: dict[str, list[dict[str, Any]]] = {form.name: [] for form in FORMS}
    for seed in arguments.seeds:
        for form in FORMS:
            file = arguments.work_dir / f"{form.name}-{seed}.json".replace(" ", "_").replace("|", "")
            if not file.exists():
                print(f"{form.name}, seed {seed}", file=sys.stderr, flush=True)
                file.write_text(json.dumps(measured(form, source, seed, arguments.work_dir)))
            found[form.name].append(json.loads(file.read_text()))
    heads = ["float", "max|w|/std", *CELLS]
    rows = [[name, *(shown([own[head] for own in each]) for head in heads)] for name, each in found.items()]
    text = "\n\n".join(
        [
            "# Other forms of range regularization",
            f"`python benchmarks/regularizer_forms.py`; {machine()} ({runtime.cpu()}); r2cli {__version__}, torch "
            f"{torch.__version__}. MobileNet-V1 0.25, digits, seeds {', '.join(map(str, arguments.seeds))}: mean ± "
            "sample deviation of top-1 in percent, in torch, on 597 scans; 8-bit activations.",
            table(["form", *(head.replace("|", "\\|") for head in heads)], rows),
        ]
    )
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
