"""From centroids to a palette: the number of tables of a layer, distinct rows, int8 tables, and sizes."""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from r2cli.errors import InputError
from r2cli.palettes import kmeans
from r2cli.quantized.palette import Palette

DIMS, LUT_BITS = (1, 2, 4, 8), (8, 32)
TOP = 127  # the largest size in an int8 table: the same for both signs, so that no centroid is clipped
LEAST_SCALE = 2.0**-120  # for a table of zeros: still a normal float32, to divide by


@dataclass(frozen=True)
class PaletteForm:
    """The form of a layer's palette: 2**bits centroids of `dim` values for every `group` output channels.

    With `group` None, one table serves all channels.
    """

    bits: int
    dim: int
    group: int | None
    lut_bits: int  # 8: an int8 table with a scale; 32: float32

    @property
    def rows(self) -> int:
        """The number of centroids in a table."""
        return int(2**self.bits)

    def groups(self, channels: int) -> int:
        """Return the number of tables of a layer: one if `group` does not divide its channels."""
        return channels // self.group if self.group and channels % self.group == 0 else 1


def require_fit(name: str, shape: Sequence[int], form: PaletteForm) -> None:
    """Check that a layer can have the form. Raises InputError if it has fewer channels than a vector has values."""
    if shape[0] < form.dim:
        lower = max(dim for dim in DIMS if dim <= shape[0])
        raise InputError(
            f"--dim {form.dim} is more than the {shape[0]} output channels of '{name}': "
            f"give --keep '{name.removesuffix('.weight')}={form.bits}x{lower}', or a lower --dim"
        )


def start(w: Tensor, form: PaletteForm, importance: Tensor | None, generator: torch.Generator) -> tuple[Tensor, int]:
    """Return the k-means centroids (groups, 2**bits, dim), float32, of a weight (channels, ...).

    Returns also how many of them are used in the group that uses fewest. If a group has fewer different vectors than
    rows, the other rows are distinct fillers, which are nearest to no vector.
    """
    groups = form.groups(w.shape[0])
    found = []
    for part, weights in zip(
        w.detach().chunk(groups), [None] * groups if importance is None else importance.chunk(groups), strict=True
    ):
        if form.dim == 1:
            own = torch.from_numpy(kmeans.scalar(kmeans.points(part, weights), form.rows)).float().reshape(-1, 1)
        else:
            vectors, each = kmeans.vectors(part, weights, form.dim)
            own = kmeans.vector(vectors, each, form.rows, generator).cpu()
        found.append(distinct(own))
    return torch.stack([filled(own, form.rows) for own in found]).to(w.device), min(map(len, found))


def distinct(centroids: Tensor) -> Tensor:
    """Return the different rows of `centroids` (n, dim), in ascending order."""
    found: Tensor = torch.unique(centroids, dim=0)
    return found


TINY = 1e-30


def filled(centroids: Tensor, rows: int) -> Tensor:
    """Return distinct `centroids` (n, dim) with more distinct rows between them: `rows` in all, in ascending order."""
    if len(centroids) == rows:
        return centroids
    # Four times as many candidates as rows, so that enough are left without those that are centroids already.
    low, high = (end.double() for end in centroids.aminmax(dim=0))
    # Where the centroids are too near each other for numbers between them: from the least one towards 0, or from 0.
    beside = torch.where(low.abs() < TINY, 1.0, -low / 1024)
    reach = torch.where(high - low > (low.abs() / 1024).clamp_min(TINY), high - low, beside)
    share = (torch.arange(4 * rows, dtype=torch.float64, device=centroids.device) + 0.5) / (4 * rows)
    between = (low + share[:, None] * reach).to(centroids.dtype)
    fresh = between[~(between[:, None] == centroids).all(2).any(1)]
    step = len(fresh) // (rows - len(centroids))
    return distinct(torch.cat([centroids, fresh[::step][: rows - len(centroids)]]))


def constant_channels(palette: Palette, codes: Tensor) -> float:
    """Return the share of channels whose weights all have one code, so that the filter has no shape (scalars only)."""
    own = codes.reshape(palette.shape[0], -1)
    return float((own == own[:, :1]).all(1).double().mean())


def palette(centroids: Tensor, shape: Sequence[int], form: PaletteForm) -> Palette:
    """Return the palette that is stored for `centroids` (groups, rows, dim), in int8 if the form says so.

    Its rows are distinct, and scalars ascend. The scale is () for one table and (channels,) for several, and 1 for a
    float table. `shape` is that of the weight.
    """
    groups = len(centroids)
    if form.dim == 1:  # `_apart` moves scalars without changing their order, and needs them in order
        centroids = centroids.sort(dim=1).values
    if form.lut_bits == 8:
        scale = (centroids.abs().amax((1, 2)).float() / TOP).clamp_min(LEAST_SCALE)
        # NaN has no integer. Training that diverges is stopped later, with a message, in `before_evaluation`.
        lut = torch.round(centroids / scale[:, None, None]).nan_to_num_().clamp_(-TOP, TOP).long()
        # Rounding may make two centroids one. Kept apart, each code has a meaning of its own, and a way back.
        lut = torch.stack([_apart(table) for table in lut.cpu()]).to(torch.int8).to(centroids.device)
    else:
        scale = torch.ones(groups, device=centroids.device)
        lut = torch.stack([_apart_floats(table) for table in centroids.float()])
    if groups == 1:
        return Palette(lut, scale[0], form.bits, tuple(shape))
    return Palette(lut, scale.repeat_interleave(shape[0] // groups), form.bits, tuple(shape), axis=0)


def _apart(rows: Tensor) -> Tensor:
    """Return integer rows (n, dim) in -128 .. 127 made distinct by small moves; scalars stay in ascending order."""
    if len(torch.unique(rows, dim=0)) == len(rows):
        return rows
    if rows.shape[1] == 1:
        flat = rows[:, 0].tolist()
        up, down = list(flat), list(flat)
        for i in range(1, len(flat)):
            up[i] = max(up[i], up[i - 1] + 1)
            down[-i - 1] = min(down[-i - 1], down[-i] - 1)
        # `up` moves rows only up, and `down` only down. Both rise by at least 1 from row to row, and so does their
        # mean, rounded down, which moves rows to both sides alike.
        lowest, highest = -TOP - 1, TOP
        means = [(a + b) // 2 for a, b in zip(up, down, strict=True)]
        last = len(means) - 1
        kept = [min(max(value, lowest + i), highest - last + i) for i, value in enumerate(means)]
        return torch.tensor(kept).reshape(-1, 1)
    taken: set[tuple[int, ...]] = set()
    # Moves of the first two values of a vector: from a corner of the range too, 17 * 17 places suffice for 256 rows.
    steps = sorted((a, b) for a in range(-16, 17) for b in range(-16, 17))
    steps.sort(key=lambda step: (step[0] ** 2 + step[1] ** 2, step))
    out = []
    for row in rows.tolist():
        moved = ((row[0] + a, row[1] + b, *row[2:]) for a, b in steps)
        free = next(m for m in moved if m not in taken and max(map(abs, m[:2])) <= TOP)
        taken.add(free)
        out.append(list(free))
    return torch.tensor(out)


def _apart_floats(rows: Tensor) -> Tensor:
    """Return float rows (n, dim) made distinct: rows that coincide are replaced by fillers."""
    different = distinct(rows)
    return rows if len(different) == len(rows) else filled(different, len(rows))


def coinciding(centroids: Tensor) -> Tensor:
    """Return which groups of `centroids` (groups, rows, dim) have two closer than 1e-4 of their range, (groups,)."""
    reach = (centroids.amax(1) - centroids.amin(1)).amax(1)
    # Without the matrix product, by which the distance of two near points is the difference of large squares.
    distance = torch.cdist(centroids, centroids, compute_mode="donot_use_mm_for_euclid_dist")
    distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    return distance.amin((1, 2)) <= 1e-4 * reach


# --- sizes ---------------------------------------------------------------------------------------------------------


def huffman_bits(occurrences: Iterable[int]) -> int:
    """Return the bits of codes that occur so often, under one Huffman code and without the table of that code.

    Source: Huffman, "A Method for the Construction of Minimum-Redundancy Codes" (1952).
    """
    counts = [n for n in occurrences if n]
    if len(counts) <= 1:
        return sum(counts)
    heapq.heapify(counts)
    total = 0
    while len(counts) > 1:  # every merge is one more bit for all that is under it
        merged = heapq.heappop(counts) + heapq.heappop(counts)
        total += merged
        heapq.heappush(counts, merged)
    return int(total)


def entropy_coded_bytes(palette: Palette, occurrences: Iterable[int]) -> int:
    """Return the bytes of a weight whose indices are Huffman-coded, with its table and scale.

    The lengths of the code take one byte for each row of the table.
    """
    return -(-huffman_bits(occurrences) // 8) + palette.lut.shape[1] + own_bytes(palette)


def own_bytes(palette: Palette) -> int:
    """Return the bytes of a palette's table and scale."""
    lut, scale = palette.lut, palette.scale
    return lut.numel() * lut.element_size() + scale.numel() * scale.element_size()
