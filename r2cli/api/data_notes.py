"""What is said of data and of weights that are taken for what they do not say."""

from collections.abc import Sequence
from pathlib import Path

import torch

from r2cli import data as datasets
from r2cli.storage.input_spec import NetworkInput, TensorsSpec


def told_of_data(origin: str, wanted: NetworkInput, loaded: datasets.Data) -> list[str]:
    """What to say of data that is taken for what it does not say: one input by another name than that of the network
    of the file `origin`, and targets that no metric reads."""
    found, lines = loaded.input, []
    if not isinstance(found, TensorsSpec) or loaded.name == datasets.NOISE:
        return []
    if len(found.names) == 1 and found.names[0] and found.names != wanted.names:
        lines.append(f"{loaded.name} holds '{found.names[0]}', which is given to '{wanted.names[0]}' of {origin}")
    if loaded.task.metric is None and next(iter(loaded.test.batches(1, torch.device("cpu"))))[1] is not None:
        lines.append(
            f"{loaded.name} holds targets that nothing measures: give --metric to have the outputs compared with them"
        )
    return lines


def told_of_beside(path: Path, beside: Sequence[str]) -> str:
    """What a file of weights holds that the network has no place for: masks are applied, the rest is left."""
    masks = [name for name in beside if name.endswith("_mask")]
    beside = [name for name in beside if name not in masks]
    applied = f"{path}: {len(masks)} masks of pruned weights were applied: the zeros are weights now" if masks else ""
    if not beside:
        return applied
    named = ", ".join(beside[:3]) + (", …" if len(beside) > 3 else "")
    unused = f"{path}: {len(beside)} tensors that stand beside the network were not used: {named}"
    return "\n".join(filter(None, (applied, unused)))
