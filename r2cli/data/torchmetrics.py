"""The metrics of torchmetrics, by the names of their classes."""

import importlib
import importlib.util
import inspect
from typing import Any

from r2cli.errors import InputError, unknown

# Its packages, in whose order a class is looked for: it does not have all of them itself, as MulticlassF1Score.
DOMAINS = (
    *("classification", "regression", "segmentation", "image", "detection", "clustering", "nominal", "retrieval"),
    *("text", "audio", "shape", "multimodal", "video"),
)


def found(own: str) -> Any:
    """The class called `own`. Raises InputError where the library, or such a class, is not there."""
    if importlib.util.find_spec("torchmetrics") is None:
        raise InputError(
            f"--metric torchmetrics:{own} needs torchmetrics, which is not installed: pip install 'r2cli[metrics]'"
        )
    known = list[str]()
    for package in (*(f"torchmetrics.{domain}" for domain in DOMAINS), "torchmetrics"):
        try:
            library: Any = importlib.import_module(package)
        except ImportError:  # what it is of needs more libraries
            continue
        if inspect.isclass(one := getattr(library, own, None)):
            return one
        known += getattr(library, "__all__", ())
    raise unknown("metric of torchmetrics", own, list(dict.fromkeys(known)))
