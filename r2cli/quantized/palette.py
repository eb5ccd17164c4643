"""Palettes: a code is the number of a row in a small table. The row is the value: `dim` numbers, a centroid.

    value = scale * lut[group, code]

One code stands for `dim` neighbouring output channels at one position; with dim 1 it stands for one weight.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from r2cli.quantized.channels import per_channel

FEW = 64  # with fewer centroids than this, a value is compared with one after the other; with more it is searched for
NEAREST_ROWS = 1 << 16  # how many vectors have their distances to all centroids in memory together


@dataclass(frozen=True)
class Palette:
    """A table of 2**bits centroids of `dim` values for each group of neighbouring output channels.

    Codes are uint8, (groups, vectors of a group); `to_vectors` says which weights a vector holds.
    """

    lut: Tensor  # (groups, 2**bits, dim), int8 or float32; the rows of a group are distinct
    scale: Tensor  # float32, () or (output channels,)
    bits: int
    shape: tuple[int, ...]  # of the weight: (output channels, ...)
    axis: int | None = None  # 0 where scale is per output channel

    @property
    def dim(self) -> int:
        """The number of values in a centroid."""
        return int(self.lut.shape[2])

    @property
    def integer_factor(self) -> int:
        """Like `Grid.integer_factor`: 1, because an int8 table has large integers already."""
        return 1

    @property
    def positions(self) -> int:
        """The number of weights of an output channel."""
        return prod(self.shape[1:])

    def encode(self, x: Tensor) -> Tensor:
        """Return the codes of the centroids nearest to x (channels, ...): (groups, vectors of a group) uint8."""
        groups, _, dim = self.lut.shape
        weight = x / self.along(self.scale, len(self.shape))
        vectors = to_vectors(weight, dim).reshape(groups, -1, dim)
        lut = self.lut.to(vectors.dtype)
        codes = torch.stack([nearest(v, centroids) for v, centroids in zip(vectors, lut, strict=True)])
        # If the last block is not full, only its own channels count: the zeros that fill it up are no weights.
        short = weight.shape[0] % dim
        if short:
            count = weight[0].numel()
            codes[-1, -count:] = nearest(vectors[-1, -count:, :short], lut[-1, :, :short])
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """Return the values of `codes`: float32, `self.shape`."""
        index = codes.long().unsqueeze(-1).expand(-1, -1, self.dim)  # (groups, vectors, dim)
        vectors = self.lut.to(torch.float32).gather(1, index)
        return from_vectors(vectors.reshape(-1, self.dim), self.shape) * self.along(self.scale, len(self.shape))

    def along(self, parameter: Tensor, ndim: int) -> Tensor:
        """Return `parameter`, which has the shape of the scale, so that it broadcasts against values of `ndim` axes."""
        return per_channel(parameter, ndim, self.axis)


def nearest(vectors: Tensor, centroids: Tensor) -> Tensor:
    """Return which of `centroids` (k, dim) is nearest to each of `vectors` (n, dim): (n,) uint8. Both are float32."""
    if centroids.shape[1] == 1:
        value, order = centroids[:, 0].double().sort()
        middle = (value[1:] + value[:-1]) / 2  # exact in float64
        # A float32 is above the middle exactly if it is above the greatest float32 that is not above the middle.
        limit = middle.float()
        limit = torch.where(limit.double() > middle, torch.nextafter(limit, limit.new_tensor(-torch.inf)), limit)
        parts = [_above(v, limit) for v in torch.split(vectors[:, 0], NEAREST_ROWS)]
        return order.to(torch.uint8).index_select(0, torch.cat(parts))
    # Not through a matrix product, which cannot tell close centroids apart: it subtracts large, nearly equal squares.
    exact = "donot_use_mm_for_euclid_dist"
    parts = [torch.cdist(v, centroids, compute_mode=exact).argmin(1) for v in torch.split(vectors, NEAREST_ROWS)]
    return torch.cat(parts).to(torch.uint8)


def _above(values: Tensor, limits: Tensor) -> Tensor:
    """Return how many of the ascending `limits` (k,) each of `values` (n,) is above: (n,) int32."""
    if len(limits) >= FEW:
        return torch.bucketize(values, limits, out_int32=True)
    count = torch.zeros_like(values, dtype=torch.uint8)
    for limit in limits:  # a comparison each is faster than a search until there are many
        count += values > limit
    return count.int()


def to_vectors(weight: Tensor, dim: int) -> Tensor:
    """Cut (C, ...) into vectors of `dim` neighbouring output channels at one position: (n, dim).

    Channels are taken in blocks of `dim`; vector j of a block holds its `dim` channels at position j. If `dim` does not
    divide C, the last block is filled up with zeros, which `from_vectors` drops again.
    """
    # Along output channels, as in coremltools. In the order of memory, vectors would straddle filters and kernel rows.
    channels = weight.shape[0]
    flat = weight.reshape(channels, -1)
    short = -channels % dim
    if short:
        flat = torch.cat([flat, flat.new_zeros(short, flat.shape[1])])
    return flat.reshape(-1, dim, flat.shape[1]).transpose(1, 2).reshape(-1, dim)


def from_vectors(vectors: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo `to_vectors`: (n, dim) back to a weight of `shape`."""
    channels, dim, positions = shape[0], vectors.shape[1], prod(shape[1:])
    return vectors.reshape(-1, positions, dim).transpose(1, 2).reshape(-1, positions)[:channels].reshape(shape)
