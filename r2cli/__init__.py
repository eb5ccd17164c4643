"""r2cli: from a PyTorch network to a deployable integer ONNX model. The Python API is described in `r2cli.api`."""

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from r2cli.api import analyze as analyze
    from r2cli.api import compare as compare
    from r2cli.api import export as export
    from r2cli.api import finetune as finetune
    from r2cli.api import load_data as load_data
    from r2cli.api import palettize as palettize
    from r2cli.api import prepare as prepare
    from r2cli.api import pretrain as pretrain
    from r2cli.api import quantize as quantize
    from r2cli.api import regularizer as regularizer
    from r2cli.api import verify as verify
    from r2cli.config.groups import ExportForm as ExportForm
    from r2cli.config.inspection import AnalyzeConfig as AnalyzeConfig
    from r2cli.config.inspection import CompareConfig as CompareConfig
    from r2cli.config.inspection import VerifyConfig as VerifyConfig
    from r2cli.config.methods import PalettizeConfig as PalettizeConfig
    from r2cli.config.methods import PtqConfig as PtqConfig
    from r2cli.config.training import PretrainConfig as PretrainConfig
    from r2cli.config.training import QatConfig as QatConfig

CONFIGS = {
    "AnalyzeConfig": "inspection",
    "CompareConfig": "inspection",
    "VerifyConfig": "inspection",
    "ExportForm": "groups",
}
CONFIGS |= {"PalettizeConfig": "methods", "PtqConfig": "methods", "PretrainConfig": "training", "QatConfig": "training"}
FUNCTIONS = (
    "analyze",
    "compare",
    "export",
    "finetune",
    "load_data",
    "palettize",
    "prepare",
    "pretrain",
    "quantize",
    "regularizer",
    "verify",
)


def __getattr__(name: str) -> Any:
    """Import the API when it is first asked for: torch takes seconds, and `r2 --help` does without."""
    from importlib import import_module

    if name in CONFIGS:
        return getattr(import_module(f"r2cli.config.{CONFIGS[name]}"), name)
    if name in FUNCTIONS:
        return getattr(import_module("r2cli.api"), name)
    raise AttributeError(f"module 'r2cli' has no attribute '{name}'")
