"""A file in another runtime: it must give what ONNX Runtime gives.

Runtimes add floats in other orders, so a code at the edge of two may fall to either, as it does between two levels of
ONNX Runtime. So the bound is that of parity with torch, 30 dB. What a runtime makes of a file is right where its plain
kernels, which compute in float what the integers stand for, are as near as that. Its integer kernels may be further
away, because they put sums of residuals on grids of their own (benchmarks/engines.md): 20 dB are asked of them, and
less only for a reason that is known. One is that they add convolutions that are not rounded yet (`unrounded_sums`):
then they must give what ONNX Runtime makes of such a file. Of plain kernels 20 dB are asked where activations have few
bits: a code of 2 bits that falls to the other side of an edge is 64 times the noise of one of 8.

In a deep network on coarse grids single codes may add up to more than any bound, as they do between ONNX Runtime and
torch (`parity.check`). A file is right there where each of its parts is right from the codes before it, by the plain
kernels with all values on grids as results, and where what the runtime gives without that is near what it gave so.
"""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, fx, nn

from r2cli.deploy import comparison, engines, likeness, runtime, unrounded_sums, weight_roles
from r2cli.deploy.audit import Check
from r2cli.deploy.engines import Arrays, Engine
from r2cli.deploy.parity import AGREEMENT, SQNR_DB
from r2cli.storage.atomic import scratch_folder

SLACK_DB = 6.0  # another runtime's flips are not those of ONNX Runtime: twice the noise
FOLLOWS = "each part is right, and single codes at the edge of two add up"
NEAR = "add residuals on grids of their own"
FEW_BITS = "do not keep codes within bounds"
KERNELS_DB = 20.0  # of integer kernels, and of plain ones where activations have few bits
SEVEN_BITS = 64  # codes up to here: two products with codes of 8 bits fit 16


def checks(
    path: Path,
    others: Iterable[Engine],
    given: Sequence[Arrays],
    *,
    usual_db: float,
    wanted: Collection[str],
    net: nn.Module,
) -> list[Check]:
    """`check` of every runtime of `others`, which are `wanted` by name or not."""
    own = net if isinstance(net, fx.GraphModule) else None
    return [check(path, one, given, usual_db=usual_db, is_wanted=one.name in wanted, net=own) for one in others]


def check(
    path: Path,
    engine: Engine,
    given: Sequence[Arrays],
    reference: Arrays | None = None,
    *,
    usual_db: float = SQNR_DB + SLACK_DB,
    is_wanted: bool = True,
    net: fx.GraphModule | None = None,
) -> Check:
    """Whether `engine` computes from the file at `path` and the inputs `given` what ONNX Runtime does.

    `reference` is what that gave, if it has run already. `usual_db` is how near two runs of the file are to each other
    anyway: single codes of a deep network on coarse grids may add up to more noise than `SQNR_DB`. `net` is the network
    of the file's checkpoint, on its grids, where there is one. A runtime that only happens to be installed (`is_wanted`
    is False) may fail to load what it is known not to load: that is said.
    """
    bound = min(SQNR_DB, usual_db - SLACK_DB)
    try:
        if reference is None:
            reference = engines.together(engines.named("onnxruntime").load(path, 0, False), given)
        found = engines.together(engine.load(path, 0, False), given)
        like = likeness.compared(found, reference, noise_db=bound)
        agrees, told = likeness.agrees(like, db=bound, share=AGREEMENT), likeness.told(like)
        reason = "" if agrees else _reason(runtime.read(path), likeness.least(like))
        if not agrees and reason in ("", NEAR) and _adds_unrounded(runtime.read(path), given, found, bound):
            reason = "add convolutions before these are rounded"
        if reason:
            bound = min(bound, KERNELS_DB) if reason == FEW_BITS else bound
            plain = likeness.compared(engines.together(engine.load(path, 0, True), given), reference, noise_db=bound)
            agrees = likeness.agrees(plain, db=bound, share=AGREEMENT)
            told = f"{likeness.told(plain)} by plain kernels; its integer ones {reason} ({told})"
        excused = reason not in ("", NEAR)
        if not agrees and net is not None and _follows(path, engine, given, net, bound, plain=excused):
            return Check(engine.name, True, f"{engine.shown} beside ONNX Runtime: {told}; {FOLLOWS}")
    except runtime.UnrunnableError as error:
        refused = isinstance(error, runtime.UnloadableError) and not is_wanted
        if not refused or not _has_coded_recurrence(runtime.read(path)):
            return Check(engine.name, False, str(error))
        what = "recurrent layers whose weights are codes"
        return Check(engine.name, True, f"not compared: {engine.shown} cannot load {what}")
    return Check(engine.name, agrees, f"{engine.shown} beside ONNX Runtime: {told}; {bound:.0f} dB are enough")


def _reason(file: onnx.ModelProto, decibels: float) -> str:
    """Why results of a runtime's integer kernels that are `decibels` away are no fault of the file; or nothing."""
    if _clips_codes(file):
        return FEW_BITS
    if not runtime.has_vnni() and _has_eight_bits(file):
        return "overflow on this processor without VNNI, where 7 bits would not"
    return NEAR if decibels >= KERNELS_DB else ""


def _adds_unrounded(file: onnx.ModelProto, given: Sequence[Arrays], found: Arrays, bound: float) -> bool:
    """Whether `found` is what ONNX Runtime makes of the file where convolutions are added before they are rounded."""
    other = unrounded_sums.unrounded(file)
    if other is None:
        return False
    run = engines.of_session(runtime.session(other.SerializeToString(), optimise=False), "the file without roundings")
    like = likeness.compared(found, engines.together(run, given), noise_db=bound)
    return likeness.agrees(like, db=bound, share=AGREEMENT)


def _follows(
    path: Path, engine: Engine, given: Sequence[Arrays], net: fx.GraphModule, bound: float, *, plain: bool
) -> bool:
    """Whether each part of the file is `net`'s from the codes before it, by plain kernels on the first samples, and
    what the runtime gives by its own kernels, or `plain` ones, is as near to that as `bound`."""
    file = runtime.read(path)
    fixed = file.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    few = {name: each[: fixed or comparison.FOLLOWED] for name, each in given[0].items()}
    opened = onnx.ModelProto()
    opened.CopyFrom(file)
    opened.graph.output.extend(onnx.ValueInfoProto(name=name) for name in comparison.exposed(file))
    with scratch_folder() as folder:
        onnx.save(opened, folder / "opened.onnx")
        run = engine.load(folder / "opened.onnx", 0, True)

    def values(*inputs: Tensor) -> dict[str, Tensor]:
        own, samples = runtime.fed(list(few), inputs), len(inputs[0])
        found = engines.together(run, list(runtime.filled(own, samples, fixed or samples)))
        return {name: torch.from_numpy(each[:samples]) for name, each in (own | found).items()}

    whole = run(few)
    if len(whole) != len(opened.graph.output):  # a runtime that takes two of the values for one
        return False
    results = {each.name: whole[each.name] for each in file.graph.output}
    like = likeness.compared(engine.load(path, 0, plain)(few), results, noise_db=bound)
    if not likeness.agrees(like, db=bound, share=AGREEMENT):
        return False
    inputs = tuple(torch.from_numpy(each) for each in few.values())
    shown = inputs if len(inputs) > 1 else inputs[0]
    return all(check.passed for check in comparison.in_parts(net, shown, file, values, values))


def _has_coded_recurrence(file: onnx.ModelProto) -> bool:
    """Whether the weights of a recurrent layer are computed from codes, which OpenVINO's processor plugin refuses."""
    held = weight_roles.constants(file)
    layers = [node for node in file.graph.node if node.op_type in ("LSTM", "GRU", "RNN")]
    return any(name not in held for node in layers for name in node.input[1:3])


def _clips_codes(file: onnx.ModelProto) -> bool:
    """Whether activations have fewer than 8 bits: their codes are clipped behind a QuantizeLinear."""
    rounded = {name for node in file.graph.node if node.op_type == "QuantizeLinear" for name in node.output}
    return any(node.op_type in ("Clip", "Min") and node.input[0] in rounded for node in file.graph.node)


def _has_eight_bits(file: onnx.ModelProto) -> bool:
    """Whether the file has codes, or tables of them, of more than 7 bits."""
    held = [each for each in file.graph.initializer if each.data_type == onnx.TensorProto.INT8]
    return any(int(np.abs(onnx.numpy_helper.to_array(each).astype(int)).max(initial=0)) > SEVEN_BITS for each in held)
