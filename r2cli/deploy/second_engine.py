"""A file in another runtime: it must give what ONNX Runtime gives.

Runtimes add floats in other orders, so a code at the edge of two may fall to either, as it does between two levels of
ONNX Runtime; and they sum residuals on other grids. Files of r2's at 8 to 2 bits were 40 to 136 dB apart
(benchmarks/engines.md). The bound is that of parity with torch, 30 dB.
"""

from collections.abc import Sequence
from pathlib import Path

from r2cli.deploy import engines, likeness, runtime
from r2cli.deploy.audit import Check
from r2cli.deploy.engines import Arrays, Engine
from r2cli.deploy.parity import AGREEMENT, SQNR_DB

SLACK_DB = 6.0  # another runtime's flips are not those of ONNX Runtime: twice the noise


def check(
    path: Path,
    engine: Engine,
    given: Sequence[Arrays],
    reference: Arrays | None = None,
    *,
    usual_db: float = SQNR_DB + SLACK_DB,
) -> Check:
    """Whether `engine` computes from the file at `path` and the inputs `given` what ONNX Runtime does.

    `reference` is what that gave, if it has run already. `usual_db` is how near two runs of the file are to each other
    anyway: single codes of a deep network on coarse grids may add up to more noise than `SQNR_DB`.

    Where `_excuse` has a reason why the runtime's integer kernels give other results, a file is right that agrees by
    its plain ones, and the reason is told.
    """
    bound = min(SQNR_DB, usual_db - SLACK_DB)
    try:
        if reference is None:
            reference = engines.together(engines.named("onnxruntime").load(path, 0, False), given)
        like = _like(path, engine, given, reference, bound, plain=False)
        agrees, told = likeness.agrees(like, db=bound, share=AGREEMENT), likeness.told(like)
        excuse = "" if agrees else _excuse(path)
        if excuse:
            plain = _like(path, engine, given, reference, bound, plain=True)
            agrees = likeness.agrees(plain, db=bound, share=AGREEMENT)
            told = f"{likeness.told(plain)} by plain kernels; {excuse} ({told})"
    except runtime.UnrunnableError as error:
        return Check(engine.name, False, str(error))
    return Check(engine.name, agrees, f"{engine.shown} beside ONNX Runtime: {told}; {bound:.0f} dB are enough")


def _excuse(path: Path) -> str:
    """Why other results of a runtime's integer kernels are no fault of the file; nothing where they would be."""
    file = runtime.read(path)
    rounded = {name for node in file.graph.node if node.op_type == "QuantizeLinear" for name in node.output}
    if any(node.op_type in ("Clip", "Min") and node.input[0] in rounded for node in file.graph.node):
        return "its 8-bit kernels do not keep codes within bounds"
    if not runtime.has_vnni():
        return "its 8-bit products overflow on this processor without VNNI, those of 7 bits do not"
    return ""


def _like(
    path: Path, engine: Engine, given: Sequence[Arrays], reference: Arrays, bound: float, *, plain: bool
) -> list[likeness.Likeness]:
    return likeness.compared(engines.together(engine.load(path, 0, plain), given), reference, noise_db=bound)
