"""Signs apart from magnitudes, as SSVQ has them, beside r2's palettes: why `r2 palettize` has no such method.

Paper: Li et al., "SSVQ: Unleashing the Potential of Vector Quantization with Sign-Splitting" (ICCV 2025).

    weight = sign(s) * table[code]

The table is that of k-means over vectors of |w|, and is trained under the codes it starts with, by the sum of the
gradients of its members. s starts at w, and the gradient passes straight through its sign, so a weight turns by its own
gradient. We leave the paper's freezing of signs that swing out. A weight takes 1 + bits / dim bits with `bits` for a
magnitude. Written out with all signs, its table is an ordinary one of 2**(dim + bits) rows, in which everything here is
run and measured. Sizes count the short table.

    python benchmarks/sign_split.py mobilenet-none.safetensors --data imagefolder:cifar10-small --bits 2 --dim 4
    python benchmarks/sign_split.py mobilenet-none.safetensors --error

The first trains with `r2 palettize`'s epochs and rate and prints a JSON line; top-1 is of the hard network in torch,
before activations are on grids. The second trains nothing: it prints the error of k-means in both forms.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn

import r2cli
from r2cli import registry
from r2cli.palettes import kmeans, tables
from r2cli.palettes.learners import Learner
from r2cli.palettes.tables import PaletteForm
from r2cli.quantized.coded import Coded
from r2cli.quantized.palette import Palette, from_vectors, to_vectors
from r2cli.registry import PaletteEntry
from r2cli.storage import checkpoint

# Bits for a magnitude, or for a vector as a whole, and its length.
WHOLE = ((1, 1), (4, 4), (3, 2), (6, 4), (2, 1), (4, 2))
SPLIT = ((0, 1), (2, 4), (4, 8), (4, 4))
TABLE_RATE = 1e-3  # the table's learning rate


class SignSplit(Learner):
    """Magnitudes of a table, and signs of their own. The form's bits are those of both: `dim` of them are signs."""

    codes: Tensor
    size: Tensor
    by_magnitude = False  # whether a sign's gradient is scaled by its magnitude, over the layer's mean

    def __init__(self, w: Tensor, form: PaletteForm, _: object, generator: torch.Generator) -> None:
        super().__init__(w, form)
        vectors = to_vectors(w.detach().abs(), form.dim)
        rows = 2 ** (form.bits - form.dim)
        found = vectors.mean(0, keepdim=True)
        if rows > 1:
            found = tables.start(
                w.detach().abs(), PaletteForm(form.bits - form.dim, form.dim, None, 32), None, generator
            )[0][0]
        self.centroids = nn.Parameter(found.clone())
        self.register_buffer("codes", torch.cdist(vectors, found).argmin(1))
        self.register_buffer("size", w.detach().abs().mean())

    def forward(self, w: Tensor) -> Tensor:
        """Return the weight (channels, ...) that the layer computes with."""
        if not self.training:
            return self.freeze(w).decode()
        magnitude = from_vectors(self.centroids[self.codes], self.shape)
        signed = magnitude * _sign(w.detach())
        if self.by_magnitude:
            pass_on = (w / self.size).clamp(-3, 3)  # a weight far from 0 needs no more reason to stay
            return signed + magnitude * (pass_on - pass_on.detach())
        return signed + (w - w.detach())

    def freeze(self, w: Tensor) -> Coded:
        """Return the hard weight, in an ordinary table: row `magnitude * 2**dim + signs`."""
        size, dim = self.centroids.detach().abs(), self.form.dim
        scale = (size.max() / tables.TOP).clamp_min(tables.LEAST_SCALE)
        bit = torch.arange(dim)
        signs = ((torch.arange(2**dim)[:, None] >> bit) & 1) * 2 - 1
        lut = (size / scale).round().clamp(1, tables.TOP)[:, None] * signs  # at least 1: a 0 would have no sign
        palette = Palette(lut.reshape(1, -1, dim).to(torch.int8), scale, self.form.bits, self.shape)
        up = to_vectors((w.detach() >= 0).long(), dim)
        return Coded(palette, ((self.codes << dim) + (up << bit).sum(1)).to(torch.uint8)[None])


def _sign(w: Tensor) -> Tensor:
    """Return 1 where `w` is 0 or more, and -1 elsewhere."""
    return torch.where(w >= 0, 1.0, -1.0)


def trained(options: argparse.Namespace) -> dict[str, object]:
    """Train with signs apart, and return what was asked and what came out."""
    SignSplit.by_magnitude = options.by_magnitude
    registry.PALETTE_METHODS["split"] = PaletteEntry(
        "sign_split:SignSplit", "signs apart", lut_lr=TABLE_RATE, clip_grad=5.0, clip_ratio=0.3
    )
    config = r2cli.PalettizeConfig(
        bits=options.dim + options.bits,
        dim=options.dim,
        method="split",
        epochs=options.epochs,
        seed=options.seed,
        lr=options.lr,
    )
    result = r2cli.palettize(options.checkpoint, options.data, config)
    # Signs, packed indices, the short table in int8, and the scales: r2's own count gives codes of 5 to 7 bits a byte.
    coded, rows = list(result.checkpoint.coded.values()), 2**options.bits
    size = sum(
        one.codes.numel() * one.codec.bits + 8 * rows * one.codec.dim + 32 * one.codec.scale.numel()
        for one in coded
        if isinstance(one.codec, Palette)
    )
    return {
        **{key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "top1": result.epochs[-1]["top1"],
        "bits_per_weight": round(size / sum(one.count for one in coded), 3),
    }


def error(weights: list[Tensor], bits: int, dim: int, *, split: bool) -> tuple[float, float]:
    """Return the bits a weight, with int8 tables, and the dB of k-means over all layers, averaged over the weights."""
    decibels = size = 0.0
    for w in weights:
        own = min(dim, max(d for d in tables.DIMS if d <= w.shape[0]))
        vectors, there = to_vectors(w.abs() if split else w, own), to_vectors(torch.ones_like(w), own)
        if bits:
            found = kmeans.vector(vectors, there, 2**bits, torch.Generator().manual_seed(0))
        else:
            found = vectors.sum(0, keepdim=True) / there.sum(0)
        lost = float(kmeans.nearest(vectors, there, found)[1].sum())
        decibels += w.numel() * 10 * math.log10(float(w.square().sum()) / max(lost, 1e-12))
        size += len(vectors) * bits + w.numel() * split + 8 * own * 2**bits
    count = sum(w.numel() for w in weights)
    return size / count, decibels / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--error", action="store_true", help="of k-means alone, in both forms")
    parser.add_argument("--data")
    parser.add_argument("--bits", type=int, default=2, help="of a vector of magnitudes; signs come on top")
    parser.add_argument("--dim", type=int, default=4)
    parser.add_argument("--by-magnitude", action="store_true", help="scale a sign's gradient by its magnitude")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not options.error:
        print(json.dumps(trained(options)))
        return
    weights = [tensor.float() for tensor in checkpoint.load(options.checkpoint).floats.values() if tensor.ndim > 1]
    for split, forms in ((False, WHOLE), (True, SPLIT)):
        for bits, dim in forms:
            size, decibels = error(weights, bits, dim, split=split)
            print(f"{'split' if split else 'whole'} {bits}/{dim}: {size:.3f} bits a weight, {decibels:.2f} dB")


if __name__ == "__main__":
    main()
