"""Where the state of a stopped run is.

Apart from state.py because commands, and the runner of recipes, ask for it before anything imports torch.
"""

from pathlib import Path


def resume_state(output: Path) -> Path:
    """The file in which a training command that is to write `output` keeps its last whole epoch."""
    return output.with_name(f"{output.stem}.resume.safetensors")
