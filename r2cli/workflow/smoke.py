"""A smoke run of a recipe: each kind of step once, on 64 digits or pairs of sentences, with two training steps.

It shows that the recipe works. Its numbers mean nothing.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from r2cli import registry
from r2cli.workflow.recipe import Recipe, Step, reads_from

DATA = "digits:64"
TEXT = ("qnli:",)  # data that networks of text read
NETWORK, PAIRS = "text/network", "text/pairs.tsv"
STAND_IN = "stand-in.safetensors"  # replaces a source that another recipe makes
TRAINING: Mapping[str, Mapping[str, Any]] = {
    "pretrain": {"data": DATA, "epochs": 1, "batch-size": 32},
    "qat": {"epochs": 1, "batch-size": 32},
    "palettize": {"epochs": 1, "batch-size": 32, "hard-epochs": 0},
}
# Options that are for other images than those of a smoke run, and gates that it would fail.
LEFT_OUT = (
    *("size", "mean", "std", "images", "calibration", "data-dir", "device", "workers"),
    *("min-accuracy", "max-drop", "max-bytes"),
)


def missing(recipe: Recipe) -> str | None:
    """Return why a smoke run of a recipe is not possible here, or None."""
    is_text = any(str(step.get("data", "")).startswith(TEXT) for step in recipe.steps)
    if is_text and importlib.util.find_spec("transformers") is None:
        return "skipped, because it needs transformers: pip install 'r2cli[text]'"
    return None


def reduced(recipe: Recipe) -> Recipe:
    """Return the recipe with only the last value of every variable: the first is often 'none', which tests little."""
    matrix = {name: values[-1:] for name, values in recipe.matrix.items()}
    tables = [{**table, "title": f"SMOKE, NO RESULT: {table.get('title', '')}"} for table in recipe.tables]
    return replace(recipe, matrix=matrix, tables=tables)


def small(todo: Sequence[Step], folder: Path) -> tuple[list[Step], list[str]]:
    """Return the steps with little data and two training steps, and sentences that say what was replaced.

    Steps for text read a network and sentences that `provide` writes to `folder`.
    """
    out: list[Step] = []
    replaced: dict[str, None] = {}
    for step in todo:
        options = {key: value for key, value in step.options.items() if key not in LEFT_OUT}
        given = _text(folder) if _is_text(step) else {"data": DATA}
        stand_ins = {key: value for key, value in given.items() if key in options}
        replaced |= {f"{options[key]} is {value}": None for key, value in stand_ins.items()}
        options |= {**TRAINING.get(step.command, {}), **stand_ins}
        if step.command == "palettize" and not _trains(options.get("method")):
            del options["hard-epochs"]
        if "source" in options and not any(reads_from(step, earlier) for earlier in out):
            replaced[f"{options['source']} is a network trained for two steps"] = None
            options["source"] = STAND_IN
            if not any(earlier.options.get("output") == STAND_IN for earlier in out):
                out.append(Step("pretrain", {**TRAINING["pretrain"], "output": STAND_IN}, {}))
        out.append(replace(step, options=options))
    return out, [*replaced, "training is two steps of 32 images", "of every variable the last value"]


def _trains(method: object) -> bool:
    """Whether a method of palettes trains, as the default does."""
    return method is None or registry.get(registry.PALETTE_METHODS, str(method)).trains


def _is_text(step: Step) -> bool:
    return str(step.options.get("data", "")).startswith(TEXT)


def _text(folder: Path) -> dict[str, str]:
    """Return the options that name the network and the sentences that `provide` writes to `folder`."""
    return {"model": f"text:{(folder / NETWORK).resolve()}", "data": f"qnli:{(folder / PAIRS).resolve()}"}


def provide(todo: Sequence[Step], folder: Path) -> None:
    """Write to `folder` what steps for text read: a network with random weights, and 128 pairs of sentences."""
    from r2cli.models import text

    if not any(_is_text(step) for step in todo):
        return
    topics = ("river", "city", "king", "song")
    pairs = [(question, sentence) for question in topics for sentence in topics] * 8
    rows = [
        f"{n}\twhich {a} is old\tthe {b} was long\t{'' if a == b else 'not_'}entailment"
        for n, (a, b) in enumerate(pairs)
    ]
    (folder / PAIRS).parent.mkdir(parents=True, exist_ok=True)
    (folder / PAIRS).write_text("\n".join(["index\tquestion\tsentence\tlabel", *rows]) + "\n", encoding="utf-8")
    text.write_tiny(folder / NETWORK, [*topics, *"which is old the was long".split()])
