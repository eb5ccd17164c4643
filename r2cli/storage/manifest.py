"""The manifest beside a command's outputs: how they were made, with checksums of what was read and written.

That of model.safetensors, and of the .onnx file that is written with it, is model.manifest.json. That of a file which
`r2 export` writes has its whole name, model.onnx.manifest.json: the checkpoint beside it may have its own. It is one
object of JSON with the fields of `Manifest`, and nothing in it depends on the clock but the times in its report.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from r2cli import __version__
from r2cli.config import machine
from r2cli.errors import InputError
from r2cli.storage import schema
from r2cli.storage.schema import Malformed

FORMAT = 1
ENDING = "manifest.json"
FORMER = "run.json"  # its ending in versions before 0.2

# Options whose names differ from those of the settings that they fill, of a regularizer and of a network.
OPTIONS = {"name": "reg", "strength": "reg-weight", "stable": "reg-form", "dim": "reg-dim"}
NETWORK = {"name": "model", "args": "model-arg"}


@dataclass(frozen=True)
class Asked:
    """What decides the result of a run; equal values are the same options.

    `options` are settings with their defaults filled in, by the names of options: --lr 0.1 is the same as no --lr where
    0.1 is the default. `read` are the files that the run reads, by name, with their checksums (None: it is missing),
    and the data set, whose images are counted and not read. What only says how the run answers, where it works or what
    it must reach is not compared: --json, --device, --workers, --data-dir, the gates, the number of threads. Nor is the
    `line` that was given, and the `places` of those files, by name.
    """

    command: str
    options: Mapping[str, Any]
    read: Mapping[str, str | None]
    line: str = ""
    places: Mapping[str, str] = field(default_factory=dict)

    def difference(self, other: "Asked") -> str | None:
        """How this, which was, differs from `other`, which is wanted, in some words; None where they are the same."""
        if self.command != other.command:
            return f"made by `r2 {self.command}`"
        old, new = _flat(self.options), _flat(other.options)
        for key in {**old, **new}:
            if old.get(key) != new.get(key):
                return f"made with --{key} {_shown(old.get(key))}, not {_shown(new.get(key))}"
        for key in {**self.read, **other.read}:
            if self.read.get(key) != other.read.get(key):
                return f"made before {key} was changed"
        return None


def checksum(path: Path) -> str | None:
    """SHA-256 of a file, as hexadecimal digits. None stands for a folder or a missing file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Manifest:
    """What a run read and wrote, and with what. `written` has the checksum of each output by its name.

    `report` is that of the command, with its metric, checks and gates. `places` of `asked` are seen from the folder of
    the manifest, which may be moved with its files.
    """

    asked: Asked
    written: Mapping[str, str | None]
    report: Mapping[str, Any]
    finished: bool
    versions: Mapping[str, str] = field(default_factory=dict)
    processor: str = ""

    @classmethod
    def made(
        cls, asked: Asked, written: Mapping[str, str | None], report: Mapping[str, Any], folder: Path
    ) -> "Manifest":
        """The unfinished manifest of a run that ends here and now, to lie in `folder`."""
        seen = replace(asked, places={name: _seen_from(folder, place) for name, place in asked.places.items()})
        return cls(seen, written, report, False, {"r2": __version__, **machine.versions()}, machine.processor())

    @classmethod
    def read(cls, path: Path) -> "Manifest | None":
        """The manifest at `path`; None where there is none, it is damaged, or it is another program's."""
        try:
            return cls.load(path)
        except InputError:
            return None

    @classmethod
    def load(cls, path: Path) -> "Manifest":
        """The manifest at `path`. Raises InputError, which says why, for a file that is none."""
        try:
            stored = schema.parsed(path.read_bytes())
            if not isinstance(stored, dict) or not {"format", "asked"} <= stored.keys():
                raise InputError(f"{path} is no manifest of r2's: name the NAME.{ENDING} beside a model")
            if stored["format"] != FORMAT:
                raise InputError(f"{path} is a manifest of another version of r2: make the model again")
            found = schema.read(cls, stored)
            if strange := [name for name in found.written if Path(name).name != name]:
                raise Malformed(f"'written' names {strange[0]}, which is not beside it")
            return found
        except Malformed as error:
            raise InputError(f"{path} is damaged ({error}): make the model again") from error
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from error

    def to_bytes(self) -> bytes:
        own = {"format": FORMAT, "r2": __version__, **asdict(self)}
        own["report"] = own.pop("report")  # the longest, at the end
        return json.dumps(own, indent=1, default=str).encode()


def beside(output: Path) -> Path:
    """Where the manifest of an output lies: a checkpoint's by its stem, which a file of the target shares, else by the
    whole name."""
    return output.with_name(f"{output.stem if output.suffix == '.safetensors' else output.name}.{ENDING}")


def former(output: Path) -> Path:
    """Where versions before 0.2 wrote that of a checkpoint."""
    return output.with_name(f"{output.stem}.{FORMER}")


def _seen_from(folder: Path, place: str) -> str:
    try:
        return os.path.relpath(place, folder)
    except ValueError:  # another drive of Windows
        return os.path.abspath(place)


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in one level, each by the name of its option; a regularizer that is not there is `reg` None."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        names = {"reg": OPTIONS, "model": NETWORK}.get(key)
        parts = value if names is not None and isinstance(value, Mapping) else {key: value}
        flat |= {(names or {}).get(own, own).replace("_", "-"): each for own, each in parts.items()}
    return flat


def _shown(value: Any) -> str:
    return "something longer" if len(str(value)) > 60 else str(value)
