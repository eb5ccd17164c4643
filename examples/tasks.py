"""Networks, data, metrics and losses of eight tasks that are no classification of images: see docs/tasks.md.

All is small: it trains in seconds, on data that scikit-learn brings or that is drawn here.
"""

import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn import datasets
from torch import Tensor, nn
from torch.utils.data import TensorDataset


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits (n, 1, 8, 8) from 0 to 1, in an order of chance, and their labels."""
    pixels, labels = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(pixels), generator=drawn(0))
    return torch.from_numpy(pixels).float().view(-1, 1, 8, 8)[order] / 16, torch.from_numpy(labels).long()[order]


def halves(*tensors: Any, test: int = 200) -> tuple[Any, Any]:
    """Train and test as TensorDatasets of (inputs, target)."""
    return TensorDataset(*(one[test:] for one in tensors)), TensorDataset(*(one[:test] for one in tensors))


# --- semantic segmentation: the output is a dict, as torchvision's networks give it ----------------------------------


def pasted(count: int, size: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (n, 1, size, size) of a digit on a noisy background; maps of classes, 10 for nothing; corners (n, 2)."""
    pixels, labels = digits()
    pixels, labels = pixels[:count].repeat_interleave(2, 2).repeat_interleave(2, 3), labels[:count]
    pictures = 0.3 * torch.rand(count, 1, size, size, generator=drawn(1))
    maps = torch.full((count, size, size), 10)
    corners = torch.randint(0, size - 16, (count, 2), generator=drawn(2))
    for picture, plane, digit, label, (top, left) in zip(pictures, maps, pixels, labels, corners.tolist(), strict=True):
        where = (slice(top, top + 16), slice(left, left + 16))
        picture[0][where] = torch.maximum(picture[0][where], digit[0])
        plane[where] = torch.where(digit[0] > 0.4, label, 10)
    return pictures, maps, corners


def segmentation_data() -> tuple[Any, Any]:
    pictures, maps, _ = pasted(1000)
    return halves(pictures, maps)


class Segmenter(nn.Module):
    """A small encoder and decoder with a skip connection and upsampling inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = block(1, 24, 2), nn.Sequential(block(24, 48, 2), block(48, 64), block(64, 64))
        self.skip, self.head = nn.Conv2d(24, 11, 1), nn.Conv2d(64, 11, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        near = self.first(x)
        far = F.interpolate(self.head(self.down(near)), scale_factor=2.0, mode="bilinear", align_corners=False)
        return {"out": F.interpolate(far + self.skip(near), scale_factor=2.0, mode="bilinear", align_corners=False)}


def mobile(name: str = "lraspp", classes: int = 11) -> nn.Module:
    """torchvision's lraspp_mobilenet_v3_large or deeplabv3_mobilenet_v3_large, with random weights."""
    from torchvision.models import segmentation

    make = getattr(segmentation, f"{name}_mobilenet_v3_large")
    network: nn.Module = make(weights=None, weights_backbone=None, num_classes=classes)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # not 0.01: the training is short
    return network


def coloured(count: int = 480, size: int = 48, classes: int = 11) -> tuple[Any, Any]:
    """The pasted digits, large and with three channels. With two classes a digit (0) is told from nothing (1) alone."""
    pictures, maps, _ = pasted(count)
    maps = maps if classes == 11 else (maps == 10).long()
    pictures = F.interpolate(pictures, (size, size), mode="bilinear").expand(-1, 3, -1, -1)
    return halves(pictures, F.interpolate(maps[:, None].float(), (size, size)).squeeze(1).long(), test=80)


def pictures(count: int = 16, size: int = 64) -> list[tuple[Tensor, None]]:
    """Unlabelled pictures (n, 3, size, size) from scikit-learn's two photographs."""
    return [(patches(count, size, colours=3), None)]


def patches(count: int, size: int, colours: int) -> Tensor:
    photographs = [torch.from_numpy(one.copy()).permute(2, 0, 1) / 255 for one in datasets.load_sample_images().images]
    corners = torch.randint(0, min(photographs[0].shape[1:]) - size, (count, 2), generator=drawn(3)).tolist()
    found = [photographs[i % 2][:, top : top + size, left : left + size] for i, (top, left) in enumerate(corners)]
    stacked = torch.stack(found)
    return stacked if colours == 3 else stacked.mean(1, keepdim=True)


# --- detection: two heads, raw; boxes are read from them by the metric -----------------------------------------------


def detection_data() -> tuple[Any, Any]:
    pictures, _, corners = pasted(1000)
    return halves(pictures, torch.cat([digits()[1][:1000, None], corners], 1))


class Detector(nn.Module):
    """Like SSD with one box a cell: for each of 6 x 6 cells the logits of 10 digits and nothing, and a corner."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(block(1, 24, 2), block(24, 48, 2), block(48, 64), block(64, 64), block(64, 64))
        self.classes, self.corner = nn.Conv2d(64, 11, 1), nn.Conv2d(64, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x)
        return self.classes(x), self.corner(x)


def cells(target: Tensor) -> tuple[Tensor, Tensor]:
    """Which cell holds the middle of each digit (n,), and how far its corner is from that cell's, in cells (n, 2)."""
    middle = (target[:, 1:] + 8) // 4
    return middle[:, 0] * 6 + middle[:, 1], (target[:, 1:] - 4 * middle).float() / 4


def detection_loss(outputs: Mapping[str, Tensor], target: Tensor) -> Tensor:
    classes, corners = (one.flatten(2) for one in outputs.values())
    cell, offset = cells(target)
    wanted = torch.full((len(target), 36), 10, device=target.device)
    wanted[torch.arange(len(target)), cell] = target[:, 0]
    found = corners.gather(2, cell[:, None, None].expand(-1, 2, 1)).squeeze(2)
    weights = torch.tensor([1.0] * 10 + [0.1], device=target.device)
    return F.cross_entropy(classes, wanted, weights) + F.mse_loss(found, offset)


class MeanPrecision:
    """mAP at an overlap of a half: the mean over digits of the area below precision against recall, times 100."""

    def __init__(self) -> None:
        self.found: dict[int, list[tuple[float, bool]]] = {digit: [] for digit in range(10)}
        self.there = [0] * 10

    def update(self, outputs: Mapping[str, Tensor], target: Tensor) -> None:
        classes, corners = (one.flatten(2) for one in outputs.values())
        scores = classes.softmax(1)[:, :10]
        for score, corner, (label, top, left) in zip(scores, corners, target.tolist(), strict=True):
            self.there[label] += 1
            matched = False
            for place in score.flatten().argsort(descending=True)[:5].tolist():
                digit, cell = divmod(place, 36)
                y, x = (4 * (cell // 6 + float(corner[0, cell])), 4 * (cell % 6 + float(corner[1, cell])))
                shared = max(0.0, 16 - abs(y - top)) * max(0.0, 16 - abs(x - left))
                right = digit == label and not matched and shared / (2 * 256 - shared) > 0.5
                matched |= right
                self.found[digit].append((float(score[digit, cell]), right))

    def compute(self) -> float:
        areas = []
        for digit, found in self.found.items():
            right = np.array([hit for _, hit in sorted(found, reverse=True)], dtype=float)
            precision = right.cumsum() / np.arange(1, len(right) + 1)
            areas.append(float((precision * right).sum()) / max(1, self.there[digit]))
        return 100 * sum(areas) / len(areas)


# --- image to image --------------------------------------------------------------------------------------------------


def super_resolution_data() -> tuple[Any, Any]:
    large = patches(1000, 24, colours=1)
    return halves(F.avg_pool2d(large, 2), large)


class Espcn(nn.Module):
    """Efficient sub-pixel convolution (Shi et al., 2016): twice as many pixels on each side."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1), nn.ReLU())
        self.up = nn.Sequential(nn.Conv2d(16, 4, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.body(x)) + F.interpolate(x, scale_factor=2.0, mode="nearest")


# --- keyword spotting, from arrays -----------------------------------------------------------------------------------


def write_keywords(path: Path, count: int = 600) -> None:
    """Six words as MFCC-like features (n, 25 steps, 10): each a curve of its own, shifted, stretched and noisy."""
    labels = torch.arange(count) % 6
    time = torch.linspace(0, 1, 25)[None, :, None] * (0.8 + 0.4 * torch.rand(count, 1, 1, generator=drawn(4)))
    time = time + 0.2 * torch.rand(count, 1, 1, generator=drawn(5))
    bands = torch.arange(10)[None, None, :]
    features = torch.sin((3 + labels[:, None, None]) * time * (1 + bands / 5)) + torch.cos(
        labels[:, None, None] * bands
    )
    features = features + 0.7 * torch.randn(features.shape, generator=drawn(6))
    np.savez(path, features=features.numpy(), target=labels.numpy())


class Spotter(nn.Module):
    """A convolution over time, a GRU or an LSTM, and a linear layer on its last state."""

    def __init__(self, kind: str = "GRU") -> None:
        super().__init__()
        self.conv = nn.Conv1d(10, 24, 3, padding=1)
        self.memory, self.head = getattr(nn, kind)(24, 32, batch_first=True), nn.Linear(32, 6)

    def forward(self, features: Tensor) -> Tensor:
        x = torch.relu(self.conv(features.transpose(1, 2))).transpose(1, 2)
        return self.head(self.memory(x)[0][:, -1])


# --- regression on a table -------------------------------------------------------------------------------------------


def diabetes() -> tuple[Any, Any]:
    table, progress = datasets.load_diabetes(return_X_y=True, scaled=True)
    order = torch.randperm(len(table), generator=drawn(7))
    x, y = torch.from_numpy(table).float()[order] * 20, torch.from_numpy(progress).float()[order, None]
    return halves(x, (y - 150) / 75, test=100)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1))


# --- two inputs ------------------------------------------------------------------------------------------------------


def compared() -> list[tuple[dict[str, Tensor], Tensor]]:
    """A digit as an image and another as a vector of ten; the label says whether the first is larger."""
    pixels, labels = digits()
    other = torch.randint(0, 10, (len(labels),), generator=drawn(8))
    return [({"image": pixels, "vector": F.one_hot(other, 10).float()}, (labels > other).long())]


class Comparer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(block(1, 32), block(32, 48, 2), nn.Flatten(), nn.Linear(48 * 16, 48), nn.ReLU())
        self.vector = nn.Sequential(nn.Linear(10, 48), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        return self.head(torch.cat([self.image(image), self.vector(vector)], 1))


# --- embeddings ------------------------------------------------------------------------------------------------------


def pairs() -> tuple[Any, Any]:
    return halves(*digits(), test=400)


def encoder() -> nn.Module:
    return nn.Sequential(block(1, 24), block(24, 48, 2), nn.Flatten(), nn.Linear(48 * 16, 32))


def attraction(outputs: Tensor, labels: Tensor) -> Tensor:
    """Digits of one class attract each other, all others push each other away (supervised contrastive learning)."""
    near = F.normalize(outputs, dim=1) @ F.normalize(outputs, dim=1).T / 0.2
    near = near.masked_fill(torch.eye(len(near), dtype=torch.bool, device=near.device), -1e4)
    same = (labels[:, None] == labels[None]).float().fill_diagonal_(0)
    return -(near.log_softmax(1) * same).sum(1).div(same.sum(1).clamp_min(1)).mean()


class NearestNeighbour:
    """The share of digits whose nearest neighbour, by the cosine of their vectors, is of their class; times 100."""

    def __init__(self) -> None:
        self.vectors: list[Tensor] = []
        self.labels: list[Tensor] = []

    def update(self, outputs: Tensor, target: Tensor) -> None:
        self.vectors.append(F.normalize(outputs.cpu(), dim=1))
        self.labels.append(target.cpu())

    def compute(self) -> float:
        vectors, labels = torch.cat(self.vectors), torch.cat(self.labels)
        near = (vectors @ vectors.T).fill_diagonal_(-1).argmax(1)
        return 100 * float((labels[near] == labels).double().mean())


def sentences(length: int = 24) -> tuple[Any, Any]:
    """Pairs of pieces of scikit-learn's descriptions as bytes (n, 2, length), and how near each other they are to be:
    1 for two of one description, 0 for others."""
    pieces, topics = [], []
    for topic, name in enumerate(("diabetes", "iris", "wine", "breast_cancer")):
        codes = torch.tensor([ord(letter) % 128 for letter in getattr(datasets, f"load_{name}")().DESCR])
        pieces.append(codes[: len(codes) // length * length].view(-1, length))
        topics += [topic] * len(pieces[-1])
    every, topic_of = torch.cat(pieces), torch.tensor(topics)
    first, second = torch.randint(len(every), (2, 1200), generator=drawn(10))
    pairs = torch.stack([every[first], every[second]], 1)
    return halves(pairs, (topic_of[first] == topic_of[second]).float(), test=300)


class SentencePairs(nn.Module):
    """transformers' BERT, tiny, as MiniLM is used: the mean of the last layer is the vector of a text. It gives the
    cosine of the vectors of each pair (n, 2, length)."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
        self.bert = BertModel(BertConfig(vocab_size=128, max_position_embeddings=32, **small), add_pooling_layer=False)

    def vector(self, ids: Tensor) -> Tensor:
        found: Tensor = self.bert(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        return F.normalize(found.mean(1), dim=1)

    def forward(self, pairs: Tensor) -> Tensor:
        return (self.vector(pairs[:, 0]) * self.vector(pairs[:, 1])).sum(1)


# --- a decoder of text -----------------------------------------------------------------------------------------------


def text(length: int = 48) -> tuple[Any, Any]:
    """Pieces of scikit-learn's licence-free descriptions as bytes, each with the byte that follows."""
    words = "".join(getattr(datasets, f"load_{name}")().DESCR for name in ("diabetes", "iris", "wine", "breast_cancer"))
    codes = torch.tensor([ord(letter) % 128 for letter in words])
    pieces = codes[: len(codes) // (length + 1) * (length + 1)].view(-1, length + 1)
    pieces = pieces[torch.randperm(len(pieces), generator=drawn(9))]
    return halves(pieces[:, :-1], pieces[:, 1:], test=60)


class Gpt(nn.Module):
    """transformers' GPT-2, tiny; the logits have the classes second, as losses and metrics want them."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        small = {"n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128}
        self.gpt = GPT2LMHeadModel(GPT2Config(**small, bos_token_id=0, eos_token_id=0, use_cache=False))

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.gpt(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return logits.transpose(1, 2)


PAST = 32


class GptStep(Gpt):
    """The same network as it writes: 16 letters behind 32 whose keys and values are given.

        `past` is (n, layers, 2, heads, 32, 16).
    It gives those of all 48 beside the logits.
    """

    def forward(self, ids: Tensor, past: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        from transformers import DynamicCache

        cache = DynamicCache()
        for place, (keys, values) in enumerate(layer.unbind(1) for layer in past.unbind(1)):
            cache.update(keys, values, place)
        known = torch.ones_like(ids[:, :1]).expand(-1, PAST + ids.shape[1])
        places = torch.arange(PAST, PAST + ids.shape[1], device=ids.device)[None]
        out = self.gpt(input_ids=ids, attention_mask=known, position_ids=places, cache=cache, use_cache=True)
        present = [torch.stack([layer.keys, layer.values], 1) for layer in cache.layers]
        return {"logits": out.logits.transpose(1, 2), "present": torch.stack(present, 1)}


def text_with_past(weights: str = "gpt.safetensors") -> tuple[Any, Any]:
    """The last 16 letters of each piece; what the float network keeps of those before them is in `past`."""
    from r2cli.storage.checkpoint import load_tensors

    network = GptStep().eval()
    network.load_state_dict(load_tensors(Path(weights))[0])
    return tuple(_stepped(network, *half.tensors) for half in text())  # type: ignore[return-value]


@torch.no_grad()
def _stepped(network: GptStep, ids: Tensor, following: Tensor) -> Any:
    from transformers import DynamicCache

    kept = DynamicCache()
    network.gpt(input_ids=ids[:, :PAST], cache=kept, use_cache=True)
    past = torch.stack([torch.stack([layer.keys, layer.values], 1) for layer in kept.layers], 1)
    return [({"ids": ids[:, PAST:], "past": past}, following[:, PAST:])]


class Perplexity:
    """Of the logits, the first of what a network gives."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def update(self, outputs: Tensor | Mapping[str, Tensor], target: Tensor) -> None:
        logits = outputs if isinstance(outputs, Tensor) else next(iter(outputs.values()))
        self.total += float(F.cross_entropy(logits, target, reduction="sum"))
        self.count += target.numel()

    def compute(self) -> float:
        return float(np.exp(self.total / self.count))


if __name__ == "__main__":
    write_keywords(Path(sys.argv[1]))
