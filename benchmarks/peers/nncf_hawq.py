"""NNCF: HAWQ, the mixed precision of its `create_compressed_model`, for several compression ratios.

It was taken out of NNCF 3, which mixes precisions for language models alone (`compress_weights`); 2.17 is the last with
it. The network is the float ONNX file, as onnx2torch reads it. Activations get bits of HAWQ's choice too.
"""

import contextlib
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"NNCF_TORCH_LEGACY_TRACING": "1", "NNCF_EXTENSION_LOAD_TIMEOUT": "0"}

import numpy as np
import onnx
import onnx2torch
import torch
from common import BATCH, top1
from nncf import NNCFConfig
from nncf.torch import create_compressed_model, register_default_init_args
from nncf.torch.quantization.layers import BaseQuantizer

RATIOS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75, 4.0)


class Network(torch.nn.Module):
    """The float network: NNCF takes what onnx2torch gives, a graph of torch.fx, for one of another backend."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.net = onnx2torch.convert(onnx.load(path)).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.net(x)
        return found


def config(shape: tuple[int, ...], ratio: float) -> NNCFConfig:
    precision = {"type": "hawq", "bits": [2, 3, 4, 8], "compression_ratio": ratio, "num_data_points": 128}
    quantization = {
        "algorithm": "quantization",
        "weights": {"mode": "symmetric", "per_channel": True},
        "initializer": {"precision": precision, "range": {"num_init_samples": 512}},
    }
    return NNCFConfig.from_dict(
        {"input_info": {"sample_size": [1, *shape]}, "target_device": "TRIAL", "compression": quantization}
    )


def logits(network: torch.nn.Module, images: Any) -> Any:
    return network(torch.from_numpy(images)).numpy()


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    calibration, known, images, labels = (np.load(job[name]) for name in ("calibration", "known", "images", "labels"))
    data = torch.utils.data.TensorDataset(torch.from_numpy(calibration), torch.from_numpy(known))
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH)
    for ratio in RATIOS:
        given = register_default_init_args(
            config(calibration.shape[1:], ratio), loader, criterion=torch.nn.CrossEntropyLoss()
        )
        with contextlib.redirect_stdout(sys.stderr):
            _, made = create_compressed_model(Network(job["model"]).eval(), given)
        made.eval()
        weights = [
            (module.weight.numel(), own.num_bits)
            for module in made.modules()
            if hasattr(module, "pre_ops")
            for own in module.pre_ops.modules()
            if isinstance(own, BaseQuantizer)
        ]
        acts = [own.num_bits for own in made.nncf.external_quantizers.values()]
        mean = sum(count * bits for count, bits in weights) / sum(count for count, _ in weights)
        with torch.no_grad():
            reached = top1(partial(logits, made), images, labels)
        point = {"bits": mean, "act_bits": sum(acts) / len(acts), "top1": reached, "ratio": ratio}
        print(json.dumps(point), flush=True)


if __name__ == "__main__":
    main()
