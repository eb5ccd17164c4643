"""One DKM training step: the paper's loop through autograd, coremltools', ours, and no palette at all.

Every variant runs in processes of its own, on one thread. Time is CPU time, the least of a few steps after a warm-up;
memory is what the process's peak grows by in a step, over what it held before, in copies of the weight (Linux only), in
a process in which every large tensor is mapped by itself, so that the allocator's leftovers do not count.
Layer: the op alone, forward and backward, on a 512x512x3x3 weight with warm centroids. Network: a whole step of
ResNet-18 with the CIFAR stem, 32x32, batch 64, SGD with momentum. All palettes take three k-means iterations at the
same temperature; coremltools' stopping rule, which would end them early, is off.

    python benchmarks/dkm.py --coremltools ENVIRONMENT --output benchmarks/dkm.md    # some ten minutes

ENVIRONMENT is a folder; a virtual environment with coremltools and this project is made there where there is none.
Without the option its column stays empty.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from time import process_time
from typing import Any

import environment
from memory import forget, mark

PEER = ("coremltools==9.0", "torch", "torchvision", str(Path(__file__).parents[1]))
FORMS = ((1, 1), (2, 1), (4, 1), (2, 2), (4, 4))
NETWORK_STEPS = (
    *(("ours", bits, dim) for bits, dim in FORMS),
    *(("naive", 2, 1), ("coremltools", 2, 1)),
)
SHAPE = (512, 512, 3, 3)
BATCH, SIZE, STEPS, ITERATIONS, SHARE = 64, 32, 2, 3, 0.15


def measured(step: Callable[[], None], unit: int) -> dict[str, float]:
    """CPU milliseconds of a step, and the growth of memory in it in units of so many bytes."""
    step()
    times, before = [], forget()
    for _ in range(STEPS):
        start = process_time()
        step()
        times.append(process_time() - start)
    return {"ms": 1000 * min(times), "copies": (mark("VmHWM") - before) / unit}


def learner_of(kind: str, w: Any, bits: int, dim: int) -> Any:
    """A function from the weight to the soft weight, as a training step calls it."""
    import torch

    from r2cli.palettes import dkm
    from r2cli.palettes.learners import Dkm
    from r2cli.palettes.tables import PaletteForm
    from r2cli.quantized.palette import from_vectors, to_vectors
    from r2cli.registry import DkmOptions

    ours = Dkm(
        w.detach(), PaletteForm(bits, dim, None, 8), DkmOptions(ITERATIONS), torch.Generator().manual_seed(0)
    ).train()
    ours.before_epoch(w.detach(), SHARE)
    if kind == "ours":
        return ours
    if kind == "coremltools":
        return coremltools(w.detach(), bits, dim, float(ours.spread) * SHARE)
    state, tau = [ours.centroids[0].clone()], float(ours.spread) * SHARE

    def step(weight: Any) -> Any:
        soft, after = dkm.reference(to_vectors(weight, dim), state[0], tau, ITERATIONS)
        state[0] = after.detach()
        return from_vectors(soft, tuple(weight.shape))

    return step


def coremltools(w: Any, bits: int, dim: int, tau: float) -> Any:
    """coremltools' function from a weight to its soft form. It runs in an environment of its own."""
    import logging

    from torch import nn

    logging.disable(logging.WARNING)
    from coremltools.optimize.torch.palettization import DKMPalettizer, DKMPalettizerConfig  # type: ignore

    one = (
        nn.Conv2d(w.shape[1], w.shape[0], w.shape[2:], bias=False)
        if w.ndim > 2
        else nn.Linear(w.shape[1], w.shape[0], bias=False)
    )
    one.weight.data.copy_(w)
    own = {"n_bits": bits, "cluster_dim": dim, "weight_threshold": 0, "palett_tau": tau}
    own |= {"kmeans_max_iter": ITERATIONS, "palett_epsilon": 0.0, "kmeans_n_init": 1}
    steps = DKMPalettizer(nn.Sequential(one), DKMPalettizerConfig.from_dict({"global_config": own}))
    made = steps.prepare()
    steps.step()
    return made[0].weight_fake_quant.train()


def layer(kind: str, bits: int, dim: int) -> dict[str, float]:
    import torch

    torch.manual_seed(0)
    w = (torch.randn(SHAPE) * 0.02).requires_grad_()
    g = torch.randn(SHAPE)
    soften = learner_of(kind, w, bits, dim)

    def step() -> None:
        soften(w).backward(g)
        w.grad = None

    return measured(step, w.numel() * 4)


def network(kind: str, bits: int, dim: int) -> dict[str, float]:
    import torch

    from r2cli import models
    from r2cli.graph import structure
    from r2cli.graph.read import trace
    from r2cli.palettes import learners
    from r2cli.storage.checkpoint import ModelSpec

    torch.manual_seed(0)
    model = models.build(ModelSpec("resnet18", 10, stem="small"))
    names = [one.name for one in structure.layers(trace(model, torch.zeros(2, 3, 32, 32)))]
    model.train().to(memory_format=torch.channels_last)
    softs = {}
    for name in names if kind != "float" else []:
        made = learner_of(kind, model.get_submodule(name).weight, bits, dim)
        softs[name] = made if kind == "ours" else _Module(made)
    learners.put_on(model, softs)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    images = torch.randn(BATCH, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (BATCH,))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return measured(step, SHAPE[0] * SHAPE[1] * 9 * 4)


def _Module(step: Any) -> Any:
    from torch import nn

    class Step(nn.Module):
        trains_weight = True

        def forward(self, w: Any) -> Any:
            return step(w)

    return Step()


def run(python: Path | str, *arguments: object) -> dict[str, float] | None:
    """One variant in two processes of its own, for time and for memory; None where one fails."""
    timed = environment.one(python, __file__, *arguments)
    exact = environment.one(python, __file__, *arguments, exact=True) if timed else None
    return {"ms": timed["ms"], "copies": exact["copies"]} if timed and exact else None


def told(bits: int, dim: int) -> str:
    return f"{bits} bit" + (f", dim {dim}" if dim > 1 else "")


def table(columns: list[str], content: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *content])


def layers(pythons: Mapping[str, Path | str]) -> str:
    rows = []
    for bits, dim in FORMS:
        found = {kind: run(python, "layer", kind, bits, dim) for kind, python in pythons.items()}
        base, own = found["naive"], found["ours"]
        assert base and own
        cells = [f"{one['ms']:.0f} ms, {one['copies']:.1f}x" if one else "-" for one in found.values()]
        ratios = own["ms"] / base["ms"], own["copies"] / base["copies"]
        rows.append([told(bits, dim), *cells, *(f"{ratio:.3f}" for ratio in ratios)])
    return table(["palette", *pythons, "ours / naive, time", "memory"], rows)


def networks(pythons: Mapping[str, Path | str]) -> str:
    base = run(sys.executable, "network", "float", 0, 1)
    assert base
    rows = [["float", f"{base['ms']:.0f} ms", "", f"{base['copies']:.1f}x", ""]]
    for kind, bits, dim in NETWORK_STEPS:
        one = run(pythons[kind], "network", kind, bits, dim) if kind in pythons else None
        if one:
            numbers = [f"{one['ms']:.0f} ms", f"{one['ms'] / base['ms']:.2f}", f"{one['copies']:.1f}x"]
            rows.append([f"{kind}, {told(bits, dim)}", *numbers, f"{one['copies'] - base['copies']:+.1f}"])
    again = run(sys.executable, "network", "float", 0, 1)
    assert again
    rows.append(
        ["float again", f"{again['ms']:.0f} ms", f"{again['ms'] / base['ms']:.2f}", f"{again['copies']:.1f}x", ""]
    )
    return table(["", "step", "of float steps", "memory", "over float's"], rows)


def report(pythons: Mapping[str, Path | str], *, whole: bool) -> str:
    """The tables, as Markdown."""
    import torch

    from r2cli import __version__

    head = f"1 thread, CPU time, least of {STEPS} steps; r2cli {__version__}, torch {torch.__version__}."
    parts = [
        "# A DKM training step",
        f"The op on a {'x'.join(map(str, SHAPE))} weight, forward and backward; memory in copies of the weight. {head}",
        layers(pythons),
    ]
    if whole:
        parts += [
            f"A whole step of ResNet-18, CIFAR stem, batch {BATCH}, {SIZE}x{SIZE}; memory in copies of its largest "
            "weight.",
            networks(pythons),
        ]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description="One DKM training step, ours and others'.")
    parser.add_argument("--output", type=Path, help="also write the tables to this file")
    parser.add_argument("--coremltools", type=Path, metavar="ENVIRONMENT", help="the folder of its environment")
    parser.add_argument("--no-network", action="store_true", help="the layer only")
    parser.add_argument("--one", nargs=4, metavar=("WHAT", "KIND", "BITS", "DIM"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        import torch

        torch.set_num_threads(1)
        what, kind, bits, dim = arguments.one
        print(json.dumps((layer if what == "layer" else network)(kind, int(bits), int(dim))))
        return
    pythons: dict[str, Path | str] = {"naive": sys.executable, "ours": sys.executable}
    peer = environment.python_of(arguments.coremltools, PEER) if arguments.coremltools else None
    if peer:
        pythons["coremltools"] = peer
    text = report(pythons, whole=not arguments.no_network)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
