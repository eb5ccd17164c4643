"""Whether a file is the one that the manifest beside it says was written."""

from pathlib import Path

from r2cli.deploy.audit import Check
from r2cli.errors import InputError
from r2cli.storage import manifest
from r2cli.storage.manifest import Manifest, checksum

NAME = "manifest"


def checks(file: Path) -> list[Check]:
    """'manifest': `file`, and what was written with it, is as a manifest beside it says; nothing without a manifest.

    What the run read and is gone or changed by now is told, and is no fault of the file. Of the manifests of the file
    alone and of its checkpoint, one may be older than the file: the check is of one that knows it.
    """
    places = (manifest.beside(file), manifest.beside(file.with_suffix(".safetensors")), manifest.former(file))
    found = [_of(file, place) for place in places if place.is_file()]
    return [next((each for each in found if each.passed), found[0])] if found else []


def _of(file: Path, place: Path) -> Check:
    try:
        record = Manifest.load(place)
    except InputError as error:
        return Check(NAME, False, str(error))
    if file.name not in record.written:
        return Check(NAME, False, f"{place} says nothing of {file.name}: it is of other files")
    own = {name: checksum(file.with_name(name)) for name in record.written}
    changed = [name for name, known in record.written.items() if own[name] not in (None, known)]
    made = f"`{record.asked.line or f'r2 {record.asked.command}'}`"
    if changed:
        return Check(NAME, False, f"{', '.join(changed)} {_is(changed)} not what {made} wrote, by {place}")
    told = f"{len([name for name in own if own[name]])} of {len(own)} files are as {made} wrote them"
    return Check(NAME, True, "; ".join([told, *_inputs(record, place)]))


def _inputs(record: Manifest, place: Path) -> list[str]:
    """What became of the files that the run read, where they are not as they were."""
    now = {name: checksum(place.parent / where) for name, where in record.asked.places.items()}
    gone = [name for name, found in now.items() if found is None]
    changed = [name for name, found in now.items() if found not in (None, record.asked.read.get(name))]
    told = [f"{', '.join(gone)}, which it read, {_is(gone)} not there"] if gone else []
    return [*told, *([f"{', '.join(changed)}, which it read, {_is(changed)} another by now"] if changed else [])]


def _is(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
