"""Classes as a network numbers them: one name a line in the order of its logits, as `--classes FILE` gives them."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

from r2cli.data.request import Data
from r2cli.errors import InputError

MOST = 1 << 20


def read(path: Path) -> tuple[str, ...]:
    """The names in the file at `path`. Raises InputError for one that cannot be read, is short, or repeats a name."""
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise InputError(f"--classes {path} cannot be read ({why}): give a text file, one class a line") from error
    if not 2 <= len(names) <= MOST:
        raise InputError(f"--classes {path} has {len(names)} lines: give the name of each of the network's classes")
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise InputError(f"--classes {path} has the class '{name}' {times} times: give each of the classes once")
    return names


def numbered(data: Data, names: tuple[str, ...], path: Path) -> Data:
    """`data` for a network of the classes `names`, which the file at `path` lists and which its labels follow.

    Raises InputError where the data has a class that is not listed, or numbers its own.
    """
    if not data.class_names:  # labels that are numbers already, or none
        return replace(data, label_count=len(names))
    if data.class_names != names:
        missing = next((name for name in data.class_names if name not in names), None)
        if missing is None:
            raise InputError(f"{data.name} numbers its classes itself: leave out --classes {path}")
        raise InputError(f"{data.name} has the class '{missing}', which --classes {path} does not list: add its line")
    return data
