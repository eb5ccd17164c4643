"""DKM: k-means that the gradient of the loss passes through.

Paper: Cho et al., "DKM: Differentiable k-Means Clustering Layer for Neural Network Compression" (ICLR 2022).

    D = |w_i - c_j|^2;  A = softmax_j(-D / tau);  c_j = sum_i A_ij w_i / sum_i A_ij;  repeated;  out = A C

`reference` is this loop, and autograd's gradient of it goes through all iterations. `scalar` and `vector` give the
same; tests/test_dkm.py holds vectors equal to 1e-11, and the gradient of a large layer's interpolated scalars to 1 %.
On a 512x512x3x3 weight they take 0.014 to 0.032 (scalars) and 0.10 to 0.12 (vectors) of its time (benchmarks/dkm.md).
Neither holds the attention of all n weights to all k centroids in memory:

- Scalars. The output F(w), its slope, and the gradient through the centroids are functions of one number, the weight.
  They are computed in float64 on a line of nodes. Each weight reads them by linear interpolation, and what weights add
  up to is collected on nodes by splitting each weight between its two neighbours. The nodes of a small layer are its
  weights, and nothing is interpolated.
- Vectors. The attention is computed chunk by chunk, and again in every pass. |w|^2 cancels in the softmax and is left
  out.

Where we differ from the paper:

- Distances are squared, as in the authors' code.
- The number of iterations is fixed.
- The temperature is a share of the layer's mean squared distance to its nearest centroid. tau is in units of the
  weights squared, so a tau that suits one layer is ten times too soft for another whose range was regularized.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

CHUNK = 1 << 16  # scalars in a chunk
CELLS = 1 << 16  # values of attention in a chunk of vectors
EXACT = 1 << 12  # up to so many scalars are nodes themselves
LEAST_NODES, MOST_NODES = 1 << 10, 1 << 16
FINENESS = 0.25  # the distance of two nodes, as a share of the width over which the attention changes clusters
EMPTY = 1e-30  # a centroid with less attention than this in total stays where it is, instead of a division by 0
NONE = 1e-26  # a share of a vector's attention below it counts as 0


def reference(v: Tensor, centroids: Tensor, tau: float, iterations: int) -> tuple[Tensor, Tensor]:
    """Return the soft vectors of `v` (n, dim), and the centroids (k, dim) after `iterations`: the paper's loop."""
    for _ in range(iterations):
        distance = (v[:, None] - centroids).square().sum(2)
        a = torch.softmax(-distance / tau, 1)
        centroids = (a.T @ v) / a.sum(0)[:, None]
    # The attention of the last iteration with the centroids that it led to: there is no further softmax.
    return a @ centroids, centroids


# --- scalars on nodes ----------------------------------------------------------------------------------------------


def attention(x: Tensor, centroids: Tensor, tau: float) -> Tensor:
    """Return the attention (k, n): the softmax over `centroids` (k,) of -(x - c)^2 / tau, for `x` (n,)."""
    c = centroids[:, None]
    # Without x^2, which is the same for all centroids of an x and cancels in the softmax.
    return torch.addcmul(-c * c / tau, c * (2 / tau), x).softmax(0)


def iterate(x: Tensor, mass: Tensor, centroids: Tensor, tau: float, iterations: int) -> tuple[Tensor, Tensor]:
    """Run the iterations on nodes `x` (n,) with `mass` (n,), both float64, from `centroids` (k,).

    Returns the centroids before the first and after each iteration, (iterations + 1, k), and F (n,), which is the last
    attention times the centroids that it led to. `mass` is how many weights a node stands for.
    """
    found = [centroids]
    moments = torch.stack([mass, mass * x], 1)  # so that one product gives a cluster's weight and its sum
    for _ in range(iterations):
        a = attention(x, found[-1], tau)
        total, sums = (a @ moments).unbind(1)
        # The clamp is for the quotient that `where` does not take, which would be NaN.
        found.append(torch.where(total > EMPTY, sums / total.clamp_min(EMPTY), found[-1]))
    return torch.stack(found), found[-1] @ a


def backward(x: Tensor, mass: Tensor, g: Tensor, centroids: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Return the slope F' (n,), and h (n,), the gradient through the centroids: dL/dw = g F'(w) + h(w).

    `x`, `mass` and `tau` are as in `iterate`, and `centroids` (iterations + 1, k) is what it returned. `g` (n,) is the
    incoming gradient, collected on the nodes.

    In one iteration, let p_j be the gradient by sum_i A_ij w_i, and c'_j the centroid after it. Then the gradient by
    A_ij is mass_i p_j (x_i - c'_j), and in the last iteration g_i c'_j more. dA_ij/dx_i is
    2/tau A_ij (c_j - sum_j A_ij c_j). So everything is a product of A with a few vectors, and nothing else is as large
    as A, which is (k, n).
    """
    h, slope, gc = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(centroids[-1])
    nodes = torch.stack([mass, mass * x, mass * x * x, g, g * x], 1)
    for t in range(len(centroids) - 2, -1, -1):
        c, after, last = centroids[t], centroids[t + 1], t == len(centroids) - 2
        # Computed again from the centroids. To keep A would take k n numbers for each iteration.
        a = attention(x, c, tau)
        mass_0, mass_1, mass_2, g_0, g_1 = (a @ nodes).unbind(1)
        if last:  # the output is A C, so here C has the gradient sum_i A_ij g_i; before, it comes from the later step
            gc = g_0
        alive = mass_0 > EMPTY
        p = torch.where(alive, gc / mass_0.clamp_min(EMPTY), 0.0)
        each = torch.stack([c, p, p * after, p * c, p * after * c, after, after * c]) @ a
        mean, own, own_after, own_c, own_both, out, out_c = each
        into = x * own - own_after
        h += own + (2 / tau) * (x * own_c - own_both - mean * into)
        into = mass * into  # sum_j A_ij of what A_ij's gradient is
        gz, gz_x = p * (mass_1 - after * mass_0), p * (mass_2 - after * mass_1)
        if last:
            slope = (2 / tau) * (out_c - mean * out)
            into = into + g * out
            gz, gz_x = gz + after * g_0, gz_x + after * g_1
        # Back through the softmax: the gradient by an exponent is A (its own gradient - the mean one), and the exponent
        # is (2 c x - c^2) / tau, whose slope by c is 2 / tau (x - c).
        less, less_x = (a @ torch.stack([into, into * x], 1)).unbind(1)
        # A centroid that did not move hands its gradient on as it is; all get what came through the attention.
        gc = torch.where(alive, 0.0, gc) + (2 / tau) * (gz_x - less_x - c * (gz - less))
    return slope, h


# --- scalars -------------------------------------------------------------------------------------------------------


class Nodes:
    """Nodes in equal steps from the least weight to the greatest. Only those next to a weight are computed on.

    An outlier stretches the line, but costs little: the nodes between it and the other weights are not used.
    """

    def __init__(self, w: Tensor, count: int) -> None:
        low, high = (float(end) for end in torch.aminmax(w))
        self.count, self.low = count, low
        self.step = (high - low) / (count - 1) or 1.0  # if all weights are equal, any step will do
        self.x = torch.arange(count, dtype=torch.float64, device=w.device) * self.step + low
        self.near: Tensor | None = None

    def place(self, chunk: Tensor) -> tuple[Tensor, Tensor]:
        """Return, for each weight of `chunk` (n,), the node below it (int32) and the share of the way to the next."""
        t = (chunk - self.low).mul_(1 / self.step)
        index = t.to(torch.int32).clamp_(0, self.count - 2)  # the greatest weight is on the last node, with no next one
        return index, t.sub_(index)

    def deposit(self, w: Tensor, weights: Tensor | None) -> Tensor:
        """Collect `weights` (n,), or ones, of the elements of `w` (n,) on the nodes on their two sides.

        Each element's weight is divided in the proportion that interpolation reads with: reading and collecting are
        each other's transpose, so the gradient fits the function. Returns the totals of the used nodes, float64.
        """
        total = torch.zeros(2, self.count, dtype=torch.float64, device=w.device)
        for start in range(0, w.numel(), CHUNK):
            index, share = self.place(w[start : start + CHUNK])
            own = None if weights is None else weights[start : start + CHUNK]
            total[0] += torch.bincount(index, own, minlength=self.count)
            total[1] += torch.bincount(index, share if own is None else share.mul_(own), minlength=self.count)
        if self.near is None:  # the first call collects ones, and so says which nodes have weights beside them
            there = total[0] != 0
            self.near = there.clone()
            self.near[1:] |= there[:-1]
        found = total[0] - total[1]
        found[1:] += total[1][:-1]
        return found[self.near]

    def table(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return values (n,) of the used nodes as tables to interpolate in: the values, and the rise to the next node.

        Both are float32, with an entry for every node.
        """
        assert self.near is not None
        full = torch.zeros_like(self.x)
        full[self.near] = values
        rise = torch.diff(full, append=full[-1:])
        return full.float(), rise.float()

    @property
    def used(self) -> Tensor:
        """The nodes that have a weight beside them, (n,) float64."""
        assert self.near is not None
        return self.x[self.near]


def nodes_for(w: Tensor, centroids: Tensor, tau: float) -> int:
    """Return how many nodes resolve the change of attention from one cluster to the next.

    The change is tau / (2 * distance of the centroids) wide. Weights that are not finite get the least number: the loss
    will be NaN, and training stops with a message about it.
    """
    low, high = torch.aminmax(w.detach())
    gap = float(centroids.max() - centroids.min()) / max(1, len(centroids) - 1)
    wanted = float(high - low) * 2 * gap / (tau * FINENESS)
    if not math.isfinite(wanted):
        return LEAST_NODES
    return min(MOST_NODES, max(LEAST_NODES, int(wanted)))


class _Scalar(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, centroids: Tensor, tau: float, iterations: int) -> tuple[Tensor, Tensor]:
        ctx.tau = tau
        # float64: a centroid is a quotient of sums over millions of weights.
        start = centroids.double()
        if w.numel() <= EXACT:  # few weights are nodes themselves, so that small layers get the exact gradient
            x = w.double()
            found, out = iterate(x, torch.ones_like(x), start, tau, iterations)
            ctx.save_for_backward(w, found)
            ctx.nodes = ctx.mass = None
            return out.to(w.dtype), found[-1]
        nodes = Nodes(w, nodes_for(w, centroids, tau))
        mass = nodes.deposit(w, None)
        found, values = iterate(nodes.used, mass, start, tau, iterations)
        value, rise = nodes.table(values)
        out = torch.empty_like(w)
        for begin in range(0, w.numel(), CHUNK):
            index, share = nodes.place(w[begin : begin + CHUNK])
            out[begin : begin + CHUNK] = torch.addcmul(value.index_select(0, index), rise.index_select(0, index), share)
        ctx.save_for_backward(w, found)
        ctx.nodes, ctx.mass = nodes, mass
        return out, found[-1]

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor, None, None, None]:
        w, found = ctx.saved_tensors
        if ctx.nodes is None:
            x, own = w.double(), g.double()
            slope, h = backward(x, torch.ones_like(x), own, found, ctx.tau)
            return (own * slope + h).to(w.dtype), None, None, None
        nodes = ctx.nodes
        slope, h = backward(nodes.used, ctx.mass, nodes.deposit(w, g), found, ctx.tau)
        tables = [*nodes.table(slope), *nodes.table(h)]
        out = torch.empty_like(w)
        for begin in range(0, w.numel(), CHUNK):
            index, share = nodes.place(w[begin : begin + CHUNK])
            steep, rise, through, climb = (table.index_select(0, index) for table in tables)
            part = steep.addcmul_(rise, share).mul_(g[begin : begin + CHUNK])
            out[begin : begin + CHUNK] = part.add_(through).addcmul_(climb, share)
        return out, None, None, None


def scalar(w: Tensor, centroids: Tensor, tau: float, iterations: int) -> tuple[Tensor, Tensor]:
    """Return the soft weights of `w` (n,), and the centroids (k,) after `iterations` from `centroids` (k,).

    The soft weights have a gradient by `w`. The centroids are float64, without a gradient.
    """
    out, after = _Scalar.apply(w, centroids.detach(), tau, iterations)
    return out, after.detach()


# --- vectors -------------------------------------------------------------------------------------------------------


def _attend(v: Tensor, centroids: Tensor, tau: float) -> Tensor:
    """Return the attention (k, n) of vectors `v` (dim, n) to `centroids` (k, dim), in the dtype of `v`.

    Shares near 0 become 0: a CPU takes many times as long for numbers below the normal ones.
    """
    c = centroids.to(v.dtype)
    # Without |v|^2, which cancels in the softmax.
    z = torch.addmm(-c.square().sum(1, keepdim=True) / tau, c * (2 / tau), v)
    # The softmax in place, with the greatest exponent at 0 so that none overflows.
    a = z.sub_(z.amax(0)).clamp_min_(math.log(NONE)).exp_()
    a = nn.functional.threshold(a, 2 * NONE, 0, inplace=True)
    return a.div_(a.sum(0))


def _pieces(blocks: Tensor, rows: int) -> tuple[Tensor, ...]:
    """Split `blocks` (m, dim, positions) into pieces whose attention to `rows` centroids stays small."""
    return torch.split(blocks, max(1, CELLS // (rows * blocks.shape[2])))


def _columns(piece: Tensor) -> Tensor:
    """Return the vectors of a piece (m, dim, positions) as columns (dim, n), a copy."""
    return piece.transpose(0, 1).reshape(piece.shape[1], -1)


def _back(columns: Tensor, piece: Tensor) -> Tensor:
    """Undo `_columns`: return `columns` (dim, n) in the shape of the `piece`."""
    count, dim, positions = piece.shape
    return columns.reshape(dim, count, positions).transpose(0, 1)


class _Vector(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: Tensor, centroids: Tensor, tau: float, iterations: int) -> tuple[Tensor, Tensor]:
        rows = len(centroids)
        found, totals = [centroids.double()], []
        for _ in range(iterations):
            # Each piece is summed in the dtype of the weights, and the pieces are added up in float64.
            total, sums = torch.zeros_like(found[0][:, :1]), torch.zeros_like(found[0])
            for piece in _pieces(blocks, rows):
                v = _columns(piece)
                a = _attend(v, found[-1], tau)
                total += a.sum(1, keepdim=True)
                sums += a @ v.T
            totals.append(total)
            found.append(torch.where(total > EMPTY, sums / total.clamp_min(EMPTY), found[-1]))
        out, last = torch.empty_like(blocks), found[-1].to(blocks.dtype).T
        for piece, own in zip(_pieces(blocks, rows), _pieces(out, rows), strict=True):
            own.copy_(_back(last @ _attend(_columns(piece), found[-2], tau), own))
        ctx.save_for_backward(blocks, torch.stack(found), torch.stack(totals))
        ctx.tau = tau
        return out, found[-1].to(blocks.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor, g_last: Tensor) -> tuple[Tensor, None, None, None]:
        blocks, found, totals = ctx.saved_tensors
        gw, rows, tau = torch.zeros_like(blocks), found.shape[1], ctx.tau
        last, gc = found[-1].to(blocks.dtype), g_last.double()
        for t in range(len(found) - 2, -1, -1):
            is_last, alive = t == len(found) - 2, totals[t] > EMPTY
            if is_last:  # the centroids' own gradient comes first: what flows on needs its sum
                for piece, own in zip(_pieces(blocks, rows), _pieces(g, rows), strict=True):
                    gc = gc + _attend(_columns(piece), found[t], tau) @ _columns(own).T
            # c = sum / total: the gradients by the sum and by the total of a cluster's attention.
            g_sum = torch.where(alive, gc / totals[t].clamp_min(EMPTY), 0.0)
            g_total = -(g_sum * found[t + 1]).sum(1, keepdim=True).to(blocks.dtype)
            own_sum, c = g_sum.to(blocks.dtype), found[t].to(blocks.dtype)
            gz_v, gz_1 = torch.zeros_like(gc), torch.zeros_like(gc[:, :1])
            for piece, own, into in zip(*(_pieces(each, rows) for each in (blocks, g, gw)), strict=True):
                v = _columns(piece)
                a = _attend(v, found[t], tau)
                ga = torch.addmm(g_total, own_sum, v)
                if is_last:
                    ga.addmm_(last, _columns(own))
                gz = ga.sub_((a * ga).sum(0)).mul_(a)  # back through the softmax
                into += _back((own_sum.T @ a).addmm_(c.T, gz, alpha=2 / tau), into)
                gz_v += gz @ v.T
                gz_1 += gz.sum(1, keepdim=True)
            gc = torch.where(alive, 0.0, gc) + (2 / tau) * (gz_v - found[t] * gz_1)
        return gw, None, None, None


def vector(blocks: Tensor, centroids: Tensor, tau: float, iterations: int) -> tuple[Tensor, Tensor]:
    """Return the soft vectors in the shape of `blocks`, and the centroids (k, dim) after `iterations`.

    Both have a gradient by `blocks` (m, dim, positions), which are m times `dim` neighbouring output channels. A vector
    is the `dim` values at one position.
    """
    out, after = _Vector.apply(blocks, centroids.detach(), tau, iterations)
    return out, after


# --- hard ----------------------------------------------------------------------------------------------------------


class _Hard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, values: Tensor, codes: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.rows = rows
        return values.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        (codes,) = ctx.saved_tensors
        index = codes.long()
        sums = torch.zeros(ctx.rows, g.shape[1], dtype=torch.float64, device=g.device)
        sums.index_add_(0, index, g.double())
        means = sums / torch.bincount(index, minlength=ctx.rows).clamp_min(1)[:, None]
        return means.to(g.dtype)[index], None, None, None


def hard(v: Tensor, values: Tensor, codes: Tensor, rows: int) -> Tensor:
    """Return `values` (n, dim), with a gradient by `v` (n, dim): each vector gets the mean gradient of its cluster.

    `codes` (n,) are the clusters, of which there are `rows`. DKM's own gradient has this limit at low temperature: each
    centroid is then the mean of its members.
    """
    out: Tensor = _Hard.apply(v, values, codes, rows)
    return out
