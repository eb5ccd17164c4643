"""coremltools' DKM from r2's float checkpoint, with `r2 palettize`'s budget: the same images, epochs and rate.

Runs in an environment that has both: `pip install . coremltools==9.0`. All layers, coremltools' defaults (three
iterations, an absolute temperature of 1e-4) but for what is given. Its hard network, finalized by itself, then has its
BatchNorm statistics collected again as r2's has, and is evaluated in torch; r2's figures are of ONNX files.

    python benchmarks/palette_peer.py mobilenet-none.safetensors --data imagefolder:cifar10-small --bits 1 --dim 1

prints one JSON line.
"""

import argparse
import copy
import itertools
import json
import logging
from pathlib import Path
from time import process_time
from typing import Any

import torch
from torch import nn

import r2cli
from r2cli import data
from r2cli.calibration import deployed
from r2cli.graph import batchnorm, operators
from r2cli.storage import checkpoint
from r2cli.train import evaluation, loop

CPU = torch.device("cpu")
MOMENTUM, DECAY, WARMUP = 0.9, 4e-5, 0.05  # as `r2 palettize` has them
CALIBRATION = 512


def palettizer(model: nn.Module, bits: int, dim: int, tau: float) -> Any:
    """coremltools' palettizer of every layer of `model`."""
    logging.disable(logging.WARNING)
    from coremltools.optimize.torch.palettization import DKMPalettizer, DKMPalettizerConfig  # type: ignore

    own = {"n_bits": bits, "cluster_dim": dim, "weight_threshold": 0, "milestone": 0, "palett_tau": tau}
    kinds = {nn.Conv2d: own, nn.Linear: own}
    return DKMPalettizer(model, DKMPalettizerConfig.from_dict({"module_type_configs": kinds}))


def fine_tune(model: nn.Module, steps: Any, source: data.Data, options: argparse.Namespace) -> None:
    """SGD with Nesterov momentum, a warm-up and a cosine; `steps` is the palettizer."""
    optimizer = torch.optim.SGD(model.parameters(), options.lr, MOMENTUM, weight_decay=DECAY, nesterov=True)
    total, number = options.epochs * loop.steps_per_epoch(len(source.train), options.batch_size), 0
    for epoch in range(1, options.epochs + 1):
        order = torch.Generator().manual_seed(options.seed * 1_000_003 + epoch)
        batches = source.train.batches(options.batch_size, CPU, order, augment=True)
        for images, labels in itertools.islice(batches, total // options.epochs):
            for group in optimizer.param_groups:
                group["lr"] = options.lr * loop.learning_rate(number, total, WARMUP)
            number += 1
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            steps.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--bits", type=int, default=1)
    parser.add_argument("--dim", type=int, default=1)
    parser.add_argument("--tau", type=float, default=1e-4, help="coremltools' temperature, in weights squared")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    loop.seed_everything(options.seed)
    made = checkpoint.load(options.checkpoint)
    source = r2cli.load_data(options.data, spec=made.input)
    model = deployed.network(made)
    steps = palettizer(model, options.bits, options.dim, options.tau)
    soft = steps.prepare()
    started = process_time()
    fine_tune(soft, steps, source, options)
    seconds = process_time() - started
    hard = steps.finalize(copy.deepcopy(soft))
    shown = data.calibration(source, CALIBRATION, CPU, options.seed)
    with torch.no_grad():
        batchnorm.reestimate_norms(hard, (images for images, _ in shown))
    layers = [module for module in hard.modules() if isinstance(module, operators.LAYERS)]
    values = [int(torch.unique(module.weight.detach()).numel()) for module in layers]
    record = {
        **{key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "top1": round(evaluation.evaluate(hard, source.test, CPU), 2),
        "soft_top1": round(evaluation.evaluate(soft.eval(), source.test, CPU), 2),
        "layers": len(layers),
        "most_values": max(values),
        "cpu_seconds": round(seconds, 1),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
