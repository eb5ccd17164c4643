"""DKM: k-means that the loss is differentiated through (Cho et al., "DKM: Differentiable k-Means Clustering Layer for
Neural Network Compression", ICLR 2022).

    D = |w_i - c_j|^2;  A = softmax_j(-D / tau);  c_j = sum_i A_ij w_i / sum_i A_ij;  repeated;  out = A C

The gradient is that of the unrolled iterations. Neither form holds the n x k attention:

Scalars. Everything is a function of one number: the output F(w), its slope, and what flows back through the
centroids. They are worked out in float64 on nodes and read off by linear interpolation; weights are put onto nodes by
splitting each between its two neighbours. A small layer's nodes are its weights, and nothing is interpolated.
Vectors. The attention is computed again, chunk by chunk, in every pass. |w|^2 cancels in the softmax and is left out.

Where we differ: squared distances (the authors' code uses them too), a fixed number of iterations, and the temperature
is a share of the layer's mean squared distance to its nearest centroid, because tau is in units of the weights squared:
what suits one layer is ten times too soft for another whose range was regularized.
"""

import math
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 16  # scalars of a chunk
ROWS = 1 << 14  # vectors of a chunk
EXACT = 1 << 12  # up to so many scalars are their own nodes
LEAST_NODES, MOST_NODES = 1 << 10, 1 << 16
FINENESS = 0.25  # of a node's width in that of the step between two clusters' attention
EMPTY = 1e-30  # attention below it moves no centroid


# --- scalars on nodes ----------------------------------------------------------------------------------------------


def attention(x: Tensor, centroids: Tensor, tau: float) -> Tensor:
    """(k, n): softmax over `centroids` (k,) of minus the squared distance to `x` (n,), over tau."""
    c = centroids[:, None]
    return torch.softmax((2 * c * x - c * c) / tau, 0)


def iterate(x: Tensor, mass: Tensor, centroids: Tensor, tau: float, iterations: int) -> Tensor:
    """The centroids before and after each iteration (iterations + 1, k) on nodes `x` (n,) of `mass` (n,), float64."""
    found = [centroids]
    for _ in range(iterations):
        a = attention(x, found[-1], tau)
        total = a @ mass
        found.append(torch.where(total > EMPTY, (a @ (mass * x)) / total.clamp_min(EMPTY), found[-1]))
    return torch.stack(found)


def output(x: Tensor, centroids: Tensor, tau: float) -> Tensor:
    """F (n,): the last attention on the updated centroids."""
    return centroids[-1] @ attention(x, centroids[-2], tau)


def backward(x: Tensor, mass: Tensor, g: Tensor, centroids: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """The slope F' (n,), and h (n,), the gradient through the centroids; dL/dw = g F'(w) + h(w).

    `g` (n,) is the incoming gradient put onto the nodes.
    """
    last = centroids[-1][:, None]
    h, slope, gc = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(centroids[-1])
    for t in range(len(centroids) - 2, -1, -1):
        c = centroids[t][:, None]
        a = attention(x, centroids[t], tau)
        steep = a * (c - (a * c).sum(0)) * (2 / tau)  # dA/dx
        into = torch.zeros_like(a)
        if t == len(centroids) - 2:
            gc = a @ g
            slope = (last * steep).sum(0)
            into = last * g
        total = a @ mass
        alive = total > EMPTY
        g_sum = torch.where(alive, gc / total.clamp_min(EMPTY), 0.0)[:, None]  # of sum A w
        line = g_sum * (x - centroids[t + 1][:, None])  # and of sum A, at every node
        h += (a * g_sum).sum(0) + (steep * line).sum(0)
        into = into + mass * line
        gz = a * (into - (a * into).sum(0))
        gc = torch.where(alive, 0.0, gc) + (2 / tau) * ((gz @ x) - centroids[t] * gz.sum(1))
    return slope, h


# --- scalars -------------------------------------------------------------------------------------------------------


class Nodes:
    """Equal steps from the least to the greatest weight; only those with a weight beside them are worked on."""

    def __init__(self, w: Tensor, count: int) -> None:
        low, high = (float(end) for end in torch.aminmax(w))
        self.count, self.low = count, low
        self.step = (high - low) / (count - 1) or 1.0
        self.x = torch.arange(count, dtype=torch.float64, device=w.device) * self.step + low
        self.near: Tensor | None = None

    def place(self, chunk: Tensor) -> tuple[Tensor, Tensor]:
        """The node below every weight (int32), and how far it is on the way to the next."""
        t = (chunk - self.low).mul_(1 / self.step)
        index = t.to(torch.int32).clamp_(0, self.count - 2)
        return index, t.sub_(index)

    def deposit(self, w: Tensor, weights: Tensor | None) -> Tensor:
        """`weights` (n,), or ones, of every element of `w` (n,) shared between the nodes on its two sides: float64."""
        total = torch.zeros(2, self.count, dtype=torch.float64, device=w.device)
        for start in range(0, w.numel(), CHUNK):
            index, share = self.place(w[start : start + CHUNK])
            own = None if weights is None else weights[start : start + CHUNK]
            total[0] += torch.bincount(index, own, minlength=self.count)
            total[1] += torch.bincount(index, share if own is None else share.mul_(own), minlength=self.count)
        if self.near is None:
            there = total[0] != 0
            self.near = there.clone()
            self.near[1:] |= there[:-1]
        found = total[0] - total[1]
        found[1:] += total[1][:-1]
        return found[self.near]

    def table(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Values at the nodes that count as float32 for `read`: themselves, and the way to the next."""
        assert self.near is not None
        full = torch.zeros_like(self.x)
        full[self.near] = values
        rise = torch.diff(full, append=full[-1:])
        return full.float(), rise.float()

    @property
    def used(self) -> Tensor:
        assert self.near is not None
        return self.x[self.near]


def nodes_for(w: Tensor, centroids: Tensor, tau: float) -> int:
    """How many nodes resolve the step between two clusters' attention, which is tau / (2 * their distance) wide.

    What is not finite needs none: its loss will say so.
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
        start = centroids.double()
        if w.numel() <= EXACT:
            x = w.double()
            found = iterate(x, torch.ones_like(x), start, tau, iterations)
            ctx.save_for_backward(w, found)
            ctx.nodes = ctx.mass = None
            return output(x, found, tau).to(w.dtype), found[-1]
        nodes = Nodes(w, nodes_for(w, centroids, tau))
        mass = nodes.deposit(w, None)
        found = iterate(nodes.used, mass, start, tau, iterations)
        value, rise = nodes.table(output(nodes.used, found, tau))
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
    """Soft weights, 1-D as `w`, and the centroids after `iterations` from `centroids` (k,): float64, no gradient."""
    out, after = _Scalar.apply(w, centroids.detach(), tau, iterations)
    return out, after.detach()


# --- vectors -------------------------------------------------------------------------------------------------------


def _attend(v: Tensor, centroids: Tensor, tau: float) -> Tensor:
    """(k, n) attention of vectors `v` (n, dim), in their dtype."""
    c = centroids.to(v.dtype)
    return torch.addmm(-c.square().sum(1, keepdim=True) / tau, c * (2 / tau), v.T).softmax(0)


class _Vector(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, centroids: Tensor, tau: float, iterations: int) -> tuple[Tensor, Tensor]:
        found, totals = [centroids.double()], []
        for _ in range(iterations):
            total, sums = torch.zeros_like(found[0][:, :1]), torch.zeros_like(found[0])
            for part in torch.split(v, ROWS):
                a = _attend(part, found[-1], tau)
                total += a.sum(1, keepdim=True)
                sums += a @ part
            totals.append(total)
            found.append(torch.where(total > EMPTY, sums / total.clamp_min(EMPTY), found[-1]))
        out, last = torch.empty_like(v), found[-1].to(v.dtype)
        for start, part in zip(range(0, len(v), ROWS), torch.split(v, ROWS), strict=True):
            torch.mm(_attend(part, found[-2], tau).T, last, out=out[start : start + ROWS])
        ctx.save_for_backward(v, torch.stack(found), torch.stack(totals))
        ctx.tau = tau
        return out, found[-1].to(v.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor, g_last: Tensor) -> tuple[Tensor, None, None, None]:
        v, found, totals = ctx.saved_tensors
        gv = torch.zeros_like(v)
        last, gc = found[-1].to(v.dtype), g_last.double()
        for t in range(len(found) - 2, -1, -1):
            is_last = t == len(found) - 2
            alive = totals[t] > EMPTY
            if is_last:  # the centroids' own gradient comes first: what flows on needs its sum
                for part, own in zip(torch.split(v, ROWS), torch.split(g, ROWS), strict=True):
                    gc = gc + _attend(part, found[t], ctx.tau) @ own
            g_sum = torch.where(alive, gc / totals[t].clamp_min(EMPTY), 0.0)
            g_total = -(g_sum * found[t + 1]).sum(1, keepdim=True).to(v.dtype)
            own_sum, c = g_sum.to(v.dtype), found[t].to(v.dtype)
            gz_v, gz_1 = torch.zeros_like(gc), torch.zeros_like(gc[:, :1])
            for part, own, into in zip(*(torch.split(t, ROWS) for t in (v, g, gv)), strict=True):
                a = _attend(part, found[t], ctx.tau)
                ga = torch.addmm(g_total, own_sum, part.T)
                if is_last:
                    ga.addmm_(last, own.T)
                gz = ga.sub_((a * ga).sum(0)).mul_(a)
                into.addmm_(gz.T, c, alpha=2 / ctx.tau).addmm_(a.T, own_sum)
                gz_v += gz @ part
                gz_1 += gz.sum(1, keepdim=True)
            gc = torch.where(alive, 0.0, gc) + (2 / ctx.tau) * (gz_v - found[t] * gz_1)
        return gv, None, None, None


def vector(v: Tensor, centroids: Tensor, tau: float, iterations: int) -> tuple[Tensor, Tensor]:
    """Soft vectors (n, dim) of `v`, and the centroids (k, dim) after `iterations`, which carry their gradient too."""
    out, after = _Vector.apply(v, centroids.detach(), tau, iterations)
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
    """`values` (n, dim) in place of `v`; a cluster's gradient is its members' mean, DKM's limit at low temperature."""
    out: Tensor = _Hard.apply(v, values, codes, rows)
    return out
