"""Attention and Swin's patch merging, written so that a traced graph shows their linear layers.

torch.fx shows `nn.MultiheadAttention` as one module, and Swin's windowed attention (Liu et al., "Swin Transformer",
2021) as one function. The weights of their projections are hidden inside, where no quantizer finds them. `REWRITTEN`
maps each such class to a module that computes the same in evaluation, with the same parameters. The names of the
parameters stay, except that `in_proj_weight` and `in_proj_bias` become `in_proj.weight` and `in_proj.bias`.

The functions below have `fx.wrap`, so that each is one node of the graph.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.models.swin_transformer import PatchMerging, ShiftedWindowAttention

from r2cli.errors import InputError


@fx.wrap
def attend(projected: Tensor, heads: int) -> Tensor:
    """Compute softmax attention of queries, keys and values (n, tokens, 3 * width). Returns (n, tokens, width)."""
    n, tokens, width = projected.shape
    split = projected.reshape(n, tokens, 3, heads, width // (3 * heads))  # n, tokens, 3, heads, width of a head
    query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)
    mixed: Tensor = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    return mixed


@fx.wrap
def attend_in_windows(projected: Tensor, bias: Tensor, window: list[int], shift: list[int], heads: int) -> Tensor:
    """Compute softmax attention within windows of queries, keys and values (n, h, w, 3 * width).

    h and w are multiples of `window`. `bias` (1, heads, tokens, tokens) is added to the scores. The map is rolled by
    `shift` before, and rolled back after. Returns (n, h, w, width).
    """
    _, height, width, _ = projected.shape
    # A window as large as the map covers all of it, so torchvision does not shift it.
    rolled = [0 if size >= whole else by for size, whole, by in zip(window, (height, width), shift, strict=True)]
    if any(rolled):
        projected = projected.roll((-rolled[0], -rolled[1]), (1, 2))
    rows, columns = height // window[0], width // window[1]
    tokens = window[0] * window[1]
    split = projected.reshape(-1, rows, window[0], columns, window[1], 3, heads, projected.shape[3] // (3 * heads))
    # three, n, row, column, heads, position in the window, width of a head
    query, key, value = split.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, -1, heads, tokens, split.shape[-1]).unbind(0)
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1) + bias
    if any(rolled):
        mask = _apart(height, width, window, rolled).to(scores)
        scores = (scores.reshape(-1, len(mask), heads, tokens, tokens) + mask.unsqueeze(1)).flatten(0, 1)
    mixed = (scores.softmax(-1) @ value).reshape(-1, rows, columns, heads, *window, split.shape[-1])
    whole: Tensor = mixed.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, height, width, heads * split.shape[-1])
    return whole.roll((rolled[0], rolled[1]), (1, 2)) if any(rolled) else whole


def _apart(height: int, width: int, window: list[int], shift: list[int]) -> Tensor:
    """Return a mask (windows, tokens, tokens): -100 between positions that are neighbours only by the roll, else 0.

    Rolling brings the map's opposite edges into one window; they must not attend to each other. A score of -100 has a
    softmax of 0 in float32; torchvision has the same number.
    """
    regions = []
    for whole, size, by in zip((height, width), window, shift, strict=True):
        position = torch.arange(whole)
        regions.append((position >= whole - size).int() + (position >= whole - by).int())
    region = 3 * regions[0].unsqueeze(1) + regions[1]
    region = region.reshape(height // window[0], window[0], width // window[1], window[1])
    region = region.transpose(1, 2).reshape(-1, window[0] * window[1])
    return -100.0 * (region.unsqueeze(1) != region.unsqueeze(2)).float()


@fx.wrap
def pad_to_windows(x: Tensor, window: list[int]) -> Tensor:
    """Pad (n, h, w, c) with zeros at the end, so that h and w become multiples of `window`."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % window[1], 0, -x.shape[1] % window[0]))


@fx.wrap
def cut(x: Tensor, like: Tensor) -> Tensor:
    """Cut x (n, h, w, c) to the height and width of `like`: remove what `pad_to_windows` added."""
    return x[:, : like.shape[1], : like.shape[2]]


@fx.wrap
def gather_patches(x: Tensor) -> Tensor:
    """Join the channels of each 2x2 block: (n, h, w, c) to (n, ceil(h/2), ceil(w/2), 4 * c)."""
    x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    return torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], -1)


class SelfAttention(nn.Module):
    """An `nn.MultiheadAttention` that attends to its own input without a mask: (n, tokens, width) to the same shape.

    Raises InputError for the other uses of that class.
    """

    def __init__(self, old: nn.MultiheadAttention, name: str) -> None:
        super().__init__()
        width = old.embed_dim
        if not old.batch_first or not old._qkv_same_embed_dim or old.bias_k is not None or old.add_zero_attn:
            raise InputError(_refused(name, "its input is not (n, tokens, width), or has keys of their own"))
        self.name, self.heads, self.out_proj = name, old.num_heads, old.out_proj
        # On the meta device, since the layer gets the old parameters: memory for others would be wasted.
        self.in_proj = nn.Linear(width, 3 * width, bias=old.in_proj_bias is not None, device="meta")
        self.in_proj.weight = old.in_proj_weight
        self.in_proj.bias = old.in_proj_bias

    def forward(self, query: Any, key: Any, value: Any, *masks: Any, **options: Any) -> Any:
        given = [*masks, *(options.get(kind) for kind in ("key_padding_mask", "attn_mask"))]
        if query is not key or key is not value or any(mask is not None for mask in given):
            raise InputError(_refused(self.name, "it attends to other values than its own, or through a mask"))
        return self.out_proj(attend(self.in_proj(query), self.heads)), None


class WindowAttention(nn.Module):
    """torchvision's `ShiftedWindowAttention`: (n, h, w, width) to the same shape."""

    def __init__(self, old: ShiftedWindowAttention, name: str) -> None:
        super().__init__()
        self.window, self.shift, self.heads = list(old.window_size), list(old.shift_size), old.num_heads
        self.qkv, self.proj = old.qkv, old.proj
        self.relative_position_bias_table = old.relative_position_bias_table
        self.register_buffer("relative_position_index", old.relative_position_index)

    def forward(self, x: Any) -> Any:
        tokens = self.window[0] * self.window[1]
        table, index = self.relative_position_bias_table, self.relative_position_index
        bias = table[index].reshape(tokens, tokens, -1).permute(2, 0, 1).unsqueeze(0)
        padded = pad_to_windows(x, self.window)
        mixed = attend_in_windows(self.qkv(padded), bias, self.window, self.shift, self.heads)
        return cut(self.proj(mixed), x)


class Merging(nn.Module):
    """torchvision's `PatchMerging`: (n, h, w, width) to (n, ceil(h/2), ceil(w/2), 2 * width)."""

    def __init__(self, old: PatchMerging, name: str) -> None:
        super().__init__()
        self.norm, self.reduction = old.norm, old.reduction

    def forward(self, x: Any) -> Any:
        return self.reduction(self.norm(gather_patches(x)))


# The class that replaces each class. It is called with the old module and its path in the network.
REWRITTEN: Mapping[type[nn.Module], Callable[[Any, str], nn.Module]] = {
    nn.MultiheadAttention: SelfAttention,
    ShiftedWindowAttention: WindowAttention,
    PatchMerging: Merging,
}


def _refused(name: str, why: str) -> str:
    return f"the attention '{name}' cannot be read ({why}): rewrite it with nn.Linear and functions"
