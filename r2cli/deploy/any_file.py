"""The proof of anybody's ONNX file, alone or beside the float file that it was made from.

There is no checkpoint to compare with. So the file is audited as it was written, it runs with ONNX Runtime's
optimisation off and at its default, and both must agree: a file whose result depends on that level holds floats that
are rounded when it is loaded, or meets a fault of the optimiser. Beside the float file it is compared output by output.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from r2cli.deploy import (
    declared_inputs,
    engines,
    external_data,
    float_nodes,
    holdings,
    likeness,
    runtime,
    second_engine,
    speed,
)
from r2cli.deploy.audit import Check
from r2cli.deploy.engines import Arrays, Engine, Run
from r2cli.deploy.parity import AGREEMENT, SQNR_DB
from r2cli.deploy.verify import Proof
from r2cli.errors import InputError

# Two runs of one file differ by single codes that fall to the other side of an edge. In a deep network on coarse grids
# they add up to some 25 dB without a fault; floats that a runtime rounds by itself, or a broken fusion, leave less.
LEVELS_DB = 20.0
UNLIKE_DB = 0.0  # of an output beside the float file's: its error is as large as the output itself


def prove(
    path: Path, given: Sequence[Arrays], *, float_file: Path | None = None, others: Sequence[Engine] = ()
) -> Proof:
    """Audit the file at `path` and run it on `given`, also in `others`, and compare it with `float_file`.

    Raises InputError where one of the files is no ONNX model, or does not run in ONNX Runtime without optimisation, or
    where both are not of one network.
    """
    written = runtime.opened(path)
    file = runtime.inlined(written)
    names = None if float_file is None else _names(runtime.opened(float_file))
    weights, total = holdings.of(file), external_data.size(path)
    reference = engines.together(loaded(path, optimise=False), given)
    checks = [
        holdings.integer(file, weights),
        holdings.used(file, total),
        holdings.size(file, weights, total, None if float_file is None else external_data.size(float_file)),
        holdings.operators(written),
    ]
    levels, found = _levels(path, given, reference)
    checks += levels
    in_float = dict(float_nodes.operators(file))
    measures: dict[str, Any] = {"bytes": total, **_shares(weights), "float_operators": in_float, "cpu": runtime.cpu()}
    if float_file is not None:
        beside = engines.together(loaded(float_file), _renamed(given, names or [], path, float_file))
        like = likeness.compared(found or reference, beside, noise_db=SQNR_DB)
        checks.append(_like_float(like))
        if found is not None:
            measures |= _speed(path, float_file, given, names or [])
        measures |= {"float_bytes": external_data.size(float_file), "outputs": [each.__dict__ for each in like]}
    if found is not None:
        checks += [second_engine.check(path, engine, given, found) for engine in others]
        measures |= {"nodes": _counts(path), "overflow_db": _overflow(path, given, found)}
    return Proof((), {}).extended(checks, measures)


def loaded(path: Path, *, optimise: bool = True, exact: bool = True) -> Run:
    """The file at `path` in ONNX Runtime. Raises InputError that says why where it does not load.

    What makes a session `exact` fails on some files that load without (two operators on one zero point of int8).
    """
    try:
        return engines.of_session(runtime.session(path, optimise=optimise, exact=exact), str(path))
    except runtime.UnrunnableError as error:
        if optimise and exact:
            return loaded(path, exact=False)
        raise _explained(path, str(error)) from error


def _explained(path: Path, message: str) -> InputError:
    """Why ONNX Runtime does not load a file, in its own words, or where they are none for people, in ours."""
    file = runtime.opened(path)
    own = {(each.domain, each.name) for each in file.functions}
    custom = sorted(f"{node.op_type} of {node.domain}" for node in file.graph.node if node.domain not in OPERATED)
    custom = [name for name in dict.fromkeys(custom) if tuple(reversed(name.split(" of "))) not in own]
    if custom:
        return InputError(
            f"{path} has operators that ONNX Runtime does not know ({', '.join(custom)}): write it without"
        )
    opset = max((each.version for each in file.opset_import if each.domain in holdings.STANDARD[:2]), default=0)
    if "opset" in message.lower():
        return InputError(
            f"{path} has opset {opset}, which ONNX Runtime {runtime.VERSION} does not load: write a lower one"
        )
    return InputError(message)


OPERATED = (*holdings.STANDARD, "com.microsoft", "com.microsoft.nchwc", "ai.onnx.training", "ai.onnx.preview.training")


def _speed(path: Path, float_file: Path, given: Sequence[Arrays], names: list[str]) -> dict[str, Any]:
    """Times of both files on one sample, where the file takes one."""
    alone = [first_of(given[0], path)]
    try:
        return speed.of_files(path, float_file, alone[0], _renamed(alone, names, path, float_file)[0]).measures()
    except runtime.UnrunnableError:  # neither one sample, nor the exact products that sessions ask for here
        return dict(speed.UNMEASURED)


def first_of(given: Arrays, path: Path) -> Arrays:
    """The first sample of a batch, or all of it where the file at `path` takes batches of one size only."""
    inputs = declared_inputs.declared(runtime.read(path), str(path))
    is_open = all(each.axes and not isinstance(each.axes[0], int) for each in inputs)
    return {name: value[:1] for name, value in given.items()} if is_open else given


def _levels(path: Path, given: Sequence[Arrays], reference: Arrays) -> tuple[list[Check], Arrays | None]:
    """'runs' and 'optimisation', and what a session at its default gives; None where it does not run.

    On a processor without VNNI only an optimised session can avoid that 8-bit products overflow. Two levels that differ
    by this alone are no fault of the file.
    """
    finite = all(np.isfinite(each).all() for each in reference.values() if each.dtype.kind == "f")
    told = f"ONNX Runtime {runtime.VERSION} gives {', '.join(reference)}" if finite else "an output is not finite"
    runs = Check("runs", finite, told)
    try:
        found = engines.together(loaded(path), given)
    except InputError as error:
        return [runs, Check("optimisation", False, f"it runs only without: {error}")], None
    same, told = _alike(found, reference)
    if not same and not runtime.has_vnni():
        same, _ = _alike(engines.together(loaded(path, exact=False), given), reference)
        told += ", by 8-bit products that overflow on this processor without VNNI" if same else ""
    return [runs, Check("optimisation", same, f"off and default: {told}")], found


def _counts(path: Path) -> dict[str, int]:
    try:
        return runtime.node_counts(path)
    except runtime.UnrunnableError:
        return runtime.node_counts(path, exact=False)


def _alike(found: Arrays, reference: Arrays) -> tuple[bool, str]:
    like = likeness.compared(found, reference, noise_db=LEVELS_DB)
    return likeness.agrees(like, db=LEVELS_DB, share=AGREEMENT), likeness.told(like)


def _like_float(like: list[likeness.Likeness]) -> Check:
    return Check("like float", likeness.least(like) > UNLIKE_DB, f"beside the float file: {likeness.told(like)}")


def _overflow(path: Path, given: Sequence[Arrays], exact: Arrays) -> float | None:
    """The dB of the kernels that ONNX Runtime takes by itself on this processor, where those overflow."""
    if runtime.has_vnni():
        return None
    found = engines.together(loaded(path, exact=False), given)
    return likeness.least(likeness.compared(found, exact, noise_db=SQNR_DB))


def _shares(weights: Sequence[holdings.Holding]) -> dict[str, Any]:
    numbers = sum(each.numbers for each in weights)
    coded = sum(each.numbers for each in weights if each.coded)
    floats = [{"name": each.name, "operator": each.operator, "bytes": each.bytes} for each in weights if not each.coded]
    return {"weights": numbers, "integer_share": 100 * coded / numbers if numbers else 0.0, "float_weights": floats}


def _renamed(given: Sequence[Arrays], names: list[str], path: Path, float_file: Path) -> list[Arrays]:
    """`given` by the `names` of the float file's inputs. Raises InputError where they are not as many."""
    own = list(given[0])
    if set(names) == set(own):
        return list(given)
    if len(names) != 1 or len(own) != 1:
        raise InputError(f"{float_file} wants {', '.join(names)} and {path} {', '.join(own)}: they are not one network")
    return [{names[0]: each[own[0]]} for each in given]


def _names(file: onnx.ModelProto) -> list[str]:
    held = {each.name for each in file.graph.initializer}
    return [each.name for each in file.graph.input if each.name not in held]
