"""What every command checks before it starts and after it is done."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from r2cli import console
from r2cli.errors import CheckFailed, InputError, unknown


def source(given: Path | None, weights: Path | None, default: Path) -> Path:
    """The file that a command reads: a checkpoint, or foreign weights. Raises InputError for both at once."""
    if given is not None and weights is not None:
        raise InputError(f"{given} and --weights {weights} are two networks: give one of them")
    return weights or given or default


def beside(source: Path, ending: str) -> Path:
    """The default output: `source` with another ending, for example 'w4a8-none.safetensors'."""
    if source.is_dir() or not source.name:
        raise InputError(f"{source} is a directory: name the checkpoint in it")
    return source.with_name(f"{source.stem}.{ending}")


def require_output(output: Path, ending: str, *, source: Path | None = None) -> None:
    """Raises InputError for an output that is a directory, has another ending, or is the source itself."""
    if output.is_dir() or not output.name:
        raise InputError(f"{output} is a directory: name a file with --output")
    if output.suffix != ending:
        raise InputError(f"--output {output} must end in {ending}")
    if source is not None and output.resolve() == source.resolve():
        raise InputError(f"--output {output} is the source itself: give another name")


def require_free(paths: Iterable[Path], *, overwrite: bool) -> None:
    """Raises InputError where an output is there already, or is a directory, before any work is done."""
    for path in paths:
        if path.exists() and not overwrite:
            raise InputError(f"{path} is there already: give --overwrite to replace it, or another --output")


def require_no_state(state: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises InputError where a stopped run's state would be lost, or where there is none to resume."""
    if state.exists() and not resume and not overwrite:
        raise InputError(f"{state} holds a stopped run: go on with --resume, or start again with --overwrite")
    if resume and not state.exists():
        raise InputError(f"{state} does not exist, so there is nothing to resume: start without --resume")


@contextmanager
def told_of(state: Path) -> Iterator[None]:
    """Say where a run that is interrupted can go on."""
    try:
        yield
    except KeyboardInterrupt:
        if state.exists():
            console.note(f"{state} holds the last whole epoch: go on with --resume")
        raise


def require_known(kind: str, name: str, choices: Sequence[str]) -> None:
    if name not in choices:
        raise unknown(kind, name, choices)


def require_training(reg: str, precision: str) -> None:
    """Raises InputError for a regularizer or a precision that does not exist."""
    require_known("regularizer", reg, ("none", "linf", "margin", "soft-minmax", "kure", "clip"))
    require_known("--precision", precision, ("auto", "float32", "bfloat16"))


def optimizer(name: str | None, *, is_text: bool) -> str:
    """The optimizer asked for: by default AdamW for text, as everyone fine-tunes it, and SGD for images."""
    if name is not None:
        require_known("--optimizer", name, ("sgd", "adamw"))
    return name or ("adamw" if is_text else "sgd")


def require_bits(option: str, bits: int, low: int = 1) -> None:
    if not low <= bits <= 8:
        raise InputError(f"{option} {bits} is impossible: give {low} to 8")


def act_bits(text: str) -> int | None:
    """`--act-bits` as a number; None where activations stay float. Raises InputError for anything else."""
    if text == "none":
        return None
    if text not in ("8", "7", "6", "5", "4"):
        raise InputError(f"--act-bits {text} is impossible here: give 8 to 4, or none to leave activations float")
    return int(text)


def keep(patterns: Sequence[str]) -> dict[str, int]:
    """`PATTERN=BITS` options as a mapping. Raises InputError for anything else."""
    kept = {}
    for text in patterns:
        pattern, _, bits = text.rpartition("=")
        if not pattern or not (bits.isascii() and bits.isdigit()):
            raise InputError(f"--keep {text} is not PATTERN=BITS, for example --keep 'classifier=8'")
        if not 1 <= int(bits) <= 8:
            raise InputError(f"--keep {text} is impossible: give 1 to 8 bits")
        kept[pattern] = int(bits)
    return kept


def keep_forms(patterns: Sequence[str], usual: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """`PATTERN=BITS` or `PATTERN=BITSxDIM` options as (bits, dim). Raises InputError for anything else."""
    kept = {}
    for text in patterns:
        pattern, _, form = text.rpartition("=")
        bits, _, dim = form.partition("x")
        dim = dim if "x" in form else str(usual[1])
        if not pattern or not all(number.isascii() and number.isdigit() for number in (bits, dim)):
            raise InputError(f"--keep {text} is not PATTERN=BITS or PATTERN=BITSxDIM, for example 'classifier=8x1'")
        if not 1 <= int(bits) <= 8 or int(dim) not in (1, 2, 4, 8):
            raise InputError(f"--keep {text} is impossible: give 1 to 8 bits, and vectors of 1, 2, 4 or 8")
        kept[pattern] = int(bits), int(dim)
    return kept


def require(
    report: Mapping[str, Any],
    *,
    min_accuracy: float | None = None,
    top1: float | None = None,
    max_drop: float | None = None,
    drop: float | None = None,
    max_bytes: int | None = None,
    size: int | None = None,
) -> None:
    """Raises CheckFailed, with the command's `report`, naming every gate that is not met; one that is None is open."""
    failed = []
    if min_accuracy is not None and top1 is not None and top1 < min_accuracy:
        failed.append(f"top-1 {top1:.2f} % is below --min-accuracy {min_accuracy:g}")
    if max_drop is not None and drop is not None and drop > max_drop:
        failed.append(f"the drop of {drop:.2f} points is above --max-drop {max_drop:g}")
    if max_bytes is not None and size is not None and size > max_bytes:
        failed.append(f"{size} bytes are above --max-bytes {max_bytes}")
    if failed:
        raise CheckFailed("gate failed: " + "; ".join(failed), report)


def unreadable(files: Sequence[str]) -> list[str]:
    """A line that counts and names the images that were left out."""
    if not files:
        return []
    named = ", ".join(files[:3]) + (", …" if len(files) > 3 else "")
    return [f"{len(files)} unreadable images were left out: {named}"]
