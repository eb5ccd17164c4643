"""One training step with quantizers, against a float step and against Brevitas' in one run.

ResNet-18 with the CIFAR stem, 32x32, batch 64, SGD with momentum, one thread, weights and activations at 2 bits. Every
variant runs in a process of its own, a float step beside it, a few rounds over. Time is CPU time, the least of all
steps after a warm-up. Memory is what the process's peak grows by in a step, over what it held before (Linux only): as
the system sees it, the median of the rounds, in which the allocator's leftovers count; and exactly, from one more
process in which every large tensor is mapped by itself. `inputs` are quantizers on what layers read, as Brevitas has
them; `outputs` is what r2 does by itself, with 8-bit grids on what enters a sum.

    python benchmarks/qat.py --brevitas ENVIRONMENT --output benchmarks/qat-step.md

ENVIRONMENT is a folder; a virtual environment with Brevitas is made there where there is none. Without the option its
column stays empty.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import environment
from memory import forget, mark

VARIANTS = tuple((method, place) for method in ("lsq", "pact", "dorefa", "ewgs") for place in ("inputs", "outputs"))
BATCH, SIZE, STEPS, BITS = 64, 32, 3, 2
BREVITAS = ("brevitas==0.12.1", "torch", "torchvision", "setuptools<70")


def measured(model: Any) -> dict[str, float]:
    """CPU milliseconds of a whole training step, and MB that memory grows by in it."""
    import torch

    torch.set_num_threads(1)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    images = torch.randn(BATCH, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (BATCH,))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return timed(step)


def timed(step: Callable[[], None]) -> dict[str, float]:
    step()
    step()
    times, before = [], forget()
    for _ in range(STEPS):
        start = process_time()
        step()
        times.append(process_time() - start)
    return {"ms": 1000 * min(times), "mb": (mark("VmHWM") - before) / 2**20}


def ours(method: str, place: str) -> dict[str, float]:
    """A step of r2's, or of the float network where `method` is 'float'."""
    import torch
    from given_images import data_of

    import r2cli
    from r2cli import models
    from r2cli.storage.checkpoint import InputSpec, ModelSpec

    torch.manual_seed(0)
    model = models.build(ModelSpec("resnet18", 10, stem="small"))
    if method == "float":
        return measured(model.to(memory_format=torch.channels_last))
    given = InputSpec(3, SIZE, SIZE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    images, labels = torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(10, (BATCH,))
    config = r2cli.QatConfig(method=method, weight_bits=BITS, act_bits=BITS, activations=place, device="cpu")
    source = data_of(given, "0123456789", [images], [(images, labels)])
    return measured(r2cli.prepare(model, source, config).net.to(memory_format=torch.channels_last))


def brevitas() -> dict[str, float]:
    """A step of Brevitas' learned-scale quantizers in torchvision's network; runs in its own environment."""
    import torch

    if not hasattr(torch.Tensor, "rename"):  # Brevitas looks for it, and torch has dropped it
        torch.Tensor.rename = lambda self, *names: self  # type: ignore[attr-defined]
    from brevitas import nn as qnn  # type: ignore[import-not-found]
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat  # type: ignore[import-not-found]
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18(num_classes=10)
    model.conv1, model.maxpool = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False), torch.nn.Identity()
    learned = {"scaling_impl_type": "parameter_from_stats", "restrict_scaling_type": "fp"}
    weight = type("Weight", (Int8WeightPerTensorFloat,), {"bit_width": BITS, **learned})
    act = type(
        "Act", (Int8ActPerTensorFloat,), {"bit_width": BITS, "signed": False, "collect_stats_steps": 1, **learned}
    )
    common = {"weight_quant": weight, "input_quant": act}
    for name, module in list(model.named_modules()):
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, torch.nn.Conv2d) and name != "conv1":
            sizes = (module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding)
            own = qnn.QuantConv2d(*sizes, bias=False, **common)
        elif isinstance(module, torch.nn.Linear):
            own = qnn.QuantLinear(module.in_features, module.out_features, bias=True, **common)
        else:
            continue
        setattr(parent, name.rpartition(".")[2], own)
    return measured(model.to(memory_format=torch.channels_last))


def measure(python: Path | str, *arguments: str, rounds: int) -> dict[str, float] | None:
    """The least `ms` and the median `mb` of the rounds, and the `exact` memory; None where a process fails."""
    found = [environment.one(python, __file__, *arguments) for _ in range(rounds)]
    exact = environment.one(python, __file__, *arguments, exact=True)
    if exact is None or any(each is None for each in found):
        return None
    there = [each for each in found if each]
    return {"ms": min(e["ms"] for e in there), "mb": median(e["mb"] for e in there), "exact": exact["mb"]}


def row(name: str, own: dict[str, float] | None, base: dict[str, float]) -> str:
    if own is None:
        return f"| {name} | not run | | | | | |"
    time, memory, exact = (own[key] / base[key] for key in ("ms", "mb", "exact"))
    cells = f"{own['ms']:.0f} ms | {time:.2f} | {own['mb']:.0f} MB | {memory:.2f}"
    return f"| {name} | {cells} | {own['exact']:.0f} MB | {exact:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--brevitas", type=Path, help="the folder of its environment")
    parser.add_argument("--methods", nargs="*", default=["lsq", "pact", "dorefa", "ewgs"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(brevitas() if options.one[0] == "brevitas" else ours(*options.one)))
        return
    wanted = {f"{method}, {place}": (method, place) for method, place in VARIANTS if method in options.methods}
    python = environment.python_of(options.brevitas, BREVITAS) if options.brevitas else None
    found = dict[str, dict[str, float] | None]()
    floats = list[dict[str, float]]()
    for name, variant in [*wanted.items(), *([("Brevitas, inputs", ("brevitas",))] if python else [])]:
        base = measure(sys.executable, "float", "-", rounds=1)
        assert base is not None
        floats.append(base)
        found[name] = measure(
            python if python and name not in wanted else sys.executable, *variant, rounds=options.rounds
        )
    base = {key: (min if key == "ms" else median)(each[key] for each in floats) for key in ("ms", "mb", "exact")}
    lines = [
        "| | step | of float steps | memory, as the system sees it | of float's | exact | of float's |",
        "|---|---|---|---|---|---|---|",
        row(f"float ({len(floats)} processes)", base, base),
        *(row(name, own, base) for name, own in found.items()),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
