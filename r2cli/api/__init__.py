"""The Python API: what the commands call, for scripts and training loops of one's own.

    result = r2cli.quantize("model.safetensors", None, r2cli.PtqConfig(weight_bits=3))
    r2cli.export(result, "model.onnx")
    assert r2cli.verify("model.onnx", result).passed

A network is a `torch.nn.Module`, the path of a checkpoint, a `Checkpoint`, or what another function returned. Data is
what `load_data` gives, a name such as "digits", or None: the data that the checkpoint names. Nothing is printed, no
file is written unless a path is given, and errors are those of `r2cli.errors`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from r2cli import data as datasets
from r2cli import registry
from r2cli.analysis import depth, depth_page, layer_table, mending, pairing, views
from r2cli.analysis.depth import Comparison
from r2cli.analysis.layer_table import Analysis
from r2cli.api import inputs, modules, proof_inputs, weights
from r2cli.calibration import deployed, earlier
from r2cli.calibration.result import Result
from r2cli.config import targets
from r2cli.config.groups import ExportForm, Inputs, Preparation
from r2cli.config.inspection import AnalyzeConfig, CompareConfig, VerifyConfig
from r2cli.config.methods import PalettizeConfig, PtqConfig
from r2cli.config.training import PretrainConfig, QatConfig
from r2cli.data import Data, metrics, own
from r2cli.deploy import any_file, engines, onnx_export, second_engine, speed
from r2cli.deploy import verify as proof_of
from r2cli.deploy.rehearsal import rehearse
from r2cli.deploy.retarget import retarget
from r2cli.deploy.verify import Proof
from r2cli.errors import InputError
from r2cli.palettes import palettization
from r2cli.palettes.palettization import PaletteResult
from r2cli.ptq import cost_table, smallest
from r2cli.ptq import quantize as ptq
from r2cli.ptq.quantize import PtqResult
from r2cli.qat import quantization_aware
from r2cli.qat.quantization_aware import QatResult, Trainable
from r2cli.storage import checkpoint
from r2cli.storage.atomic import scratch_folder, write_atomically
from r2cli.storage.checkpoint import Checkpoint
from r2cli.storage.input_spec import Given, count
from r2cli.train import pretraining
from r2cli.train.pretraining import Pretrained
from r2cli.train.regularizers import Regularizer, RegularizerSpec
from r2cli.train.reporter import SILENT, Reporter

Network = nn.Module | Checkpoint | Result | Pretrained | str | Path
PROOF_BATCH = 256  # images that the proof runs at once, at most
COMPARED_AT_ONCE = 32  # both networks keep what they compute
CPU = torch.device("cpu")


def load_data(given: Any, *, metric: str | None = None, loss: str | None = None, **preparation: Any) -> Data:
    """A data set by its name, as `r2cli.data.load` takes it, or data of your own.

    Your own is train and test, or one of them: datasets, loaders or iterables of batches (`data/own.py`). `metric` and
    `loss` are named as --metric and --loss name them. Raises InputError for anything else.
    """
    found = datasets.load(given, **preparation) if isinstance(given, str) else own.to_data(datasets.OWN, given)
    found = found if metric is None else inputs.measured_as(found, metrics.named(metric))
    return datasets.learning(found, loss)


def pretrain(
    network: nn.Module | str,
    data: Data | str = "digits",
    config: PretrainConfig | None = None,
    *,
    state: Path | None = None,
    reporter: Reporter = SILENT,
) -> Pretrained:
    """Train a float network, by its name or in place, with a regularizer of its weights' range.

    `state` is a file that keeps the last whole epoch. Raises R2Error where training diverges, InputError for a path.
    """
    if not isinstance(network, nn.Module | str):
        raise InputError(f"pretrain takes a torch module or the name of a network, not {network!r}: load a file first")
    source = datasets.load(data) if isinstance(data, str) else data
    spec = (
        weights.model_spec(Preparation(), network, source)
        if isinstance(network, str)
        else modules.spec_of(network, source)
    )
    config = config or PretrainConfig()
    run = pretraining.ready(spec, source, config, recorded={"data": datasets.recorded(source.name)})
    model = pretraining.network_of(run, None if isinstance(network, str) else network)
    with _kept(state) as path:
        return pretraining.train(run, model, path, reporter=reporter)


def quantize(
    network: Network,
    data: Data | str | None = None,
    config: PtqConfig | None = None,
    *,
    max_drop: float | None = None,
    reporter: Reporter = SILENT,
) -> PtqResult:
    """Quantize a float network without training. The same work as `r2 ptq`, and the same bytes.

    `max_drop` is what `minimize` may lose of the metric. Raises InputError for what does not fit the network.
    """
    config = config or PtqConfig()
    made, source = _read(network, data, needed=ptq.needs_data(config))
    rehearse(made, config.target, source.shown)
    looks = ptq.looks_at_images(config, has_data=data is not None)
    looks = looks and (data is not None or source.name != datasets.NOISE)
    count = datasets.calibration_count(config.calibration, source) if looks else 0
    if config.minimize is not None:
        return smallest.find(made, source, config, calibration=count, max_drop=max_drop, reporter=reporter)
    return ptq.quantize(made, source, config, calibration=count, reporter=reporter)


def finetune(
    network: Network,
    data: Data | str | None = None,
    config: QatConfig | None = None,
    *,
    state: Path | None = None,
    reporter: Reporter = SILENT,
) -> QatResult:
    """Train a float network with weights and activations on few levels, as `r2 qat` does.

    `state` is a file that keeps the last whole epoch. Raises R2Error where training diverges.
    """
    config = config or QatConfig()
    made, source = _read(network, data)
    rehearse(made, config.target, source.shown)
    run = quantization_aware.ready(made, source, config)
    with _kept(state) as path:
        return quantization_aware.train(run, path, reporter=reporter)


def palettize(
    network: Network,
    data: Data | str | None = None,
    config: PalettizeConfig | None = None,
    *,
    state: Path | None = None,
    reporter: Reporter = SILENT,
) -> PaletteResult:
    """Compress weights to indices into small tables, as `r2 palettize` does.

    `state` is a file that keeps the last whole epoch of training. Raises R2Error where training diverges.
    """
    config = config or PalettizeConfig()
    needed = palettization.needs_data(config, config.method or registry.PALETTE_METHOD)
    made, source = _read(network, data, needed=needed)
    rehearse(made, config.target, source.shown)
    run = palettization.ready(made, source, config)
    with _kept(state) as path:
        return palettization.compress(run, path, reporter=reporter)


def prepare(network: Network, data: Data | str | None = None, config: QatConfig | None = None) -> Trainable:
    """The network with quantizers, a module to train in a loop of one's own; its `freeze()` gives the result."""
    config = config or QatConfig()
    made, source = _read(network, data)
    return Trainable(quantization_aware.ready(made, source, config))


def regularizer(network: nn.Module, name: str, strength: float | None = None, *, dim: int = 1) -> Regularizer:
    """A range regularizer for a loop of one's own.

    Call its `add_gradients()` between `backward()` and `step()`, and its `after_step()` behind `step()`. Its
    `parameters` (margin's M, soft-min-max's alpha) go to the optimizer. `strength` is lambda, by default the paper's
    0.01, or for 'clip' the 2 deviations that it clamps to; `dim` is the vector length of a later palette. Raises
    InputError for an unknown name.
    """
    usual = registry.default_strength(name, size=224, images=0)
    return Regularizer(RegularizerSpec(name, usual if strength is None else strength, dim=dim), network)


def export(network: Network, path: str | Path | None = None, form: ExportForm | None = None) -> bytes:
    """The network as an ONNX file, float or with integer weights; written to `path`, atomically, where one is given.

    `form` says for which target, and how many images at once; for `tflite` and `ethos-u` it is a file of TensorFlow
    Lite. Raises InputError for what the target cannot hold.
    """
    form = form or ExportForm()
    made = retarget(_checkpoint_of(network), form.target)
    targets.require_ending(path, made.target)
    content = onnx_export.to_bytes(made, form)
    if targets.get(made.target).container == targets.TFLITE:
        from r2cli.deploy import tflite_export

        content = tflite_export.to_bytes(content)
    if path is not None:
        write_atomically(Path(path), content)
    return content


def verify(
    path: str | Path,
    against: Network | None = None,
    data: Data | str | None = None,
    config: VerifyConfig | None = None,
    *,
    original: Checkpoint | None = None,
    timed: bool = True,
    reporter: Reporter = SILENT,
) -> Proof:
    """The proof of the file at `path`, r2's or anybody's, also in each runtime that `config` names or finds.

    `against` is what it was made from: a network, which it is compared with on the test images of `data`; or the path
    of a float `.onnx` file; None for the file alone. The proof also says how far the file is from the float network,
    which a result brings along, or `original` is; and where it is `timed`, how fast beside it. A file of TensorFlow
    Lite is proved by the ONNX file of the same codes, beside which it runs in LiteRT. Raises InputError for a file
    that is no ONNX model or does not run as written, one of TensorFlow Lite alone, and a runtime unknown or missing.
    """
    config, path = config or VerifyConfig(), Path(path)
    if targets.is_tflite(path):
        return _verify_tflite(path, against, data, config, original, reporter)
    others = [engine for engine in engines.chosen(config.runtime) if engine.name != "onnxruntime"]
    if against is None or (isinstance(against, str | Path) and Path(against).suffix == ".onnx"):
        given = proof_inputs.of_file(path, data, config)
        float_file = None if against is None else Path(against)
        proof = any_file.prove(path, given.batches, float_file=float_file, others=others)
        return proof.extended((), {"inputs": given.told})
    made, source = _read(against, data)
    original = against.original if isinstance(against, Result) else original
    float_network = None if original is None else deployed.network(original)
    with reporter.bar("prove", len(source.test)) as progress:

        def batches() -> Iterator[datasets.Batch]:
            for images, target in source.test.batches(datasets.batch_that_fits(source.test, PROOF_BATCH), CPU):
                yield images, target
                progress.advance(count(images))

        network = deployed.network(made)
        proof = proof_of.prove(path, made, network, batches(), float_network, source.task)
    timed = timed and bool(made.coded)
    if not _ran(proof) or not (others or timed):
        return proof.extended((), speed.UNMEASURED)
    shown = proof_inputs.of_data(path, source).batches
    wanted, usual = {*config.runtime, made.target}, proof.measures["sqnr_db"]
    checks = second_engine.checks(path, others, shown, usual_db=usual, wanted=wanted, net=network)
    times = speed.of_checkpoint(path, made, any_file.first_of(shown[0], path)).measures() if timed else {}
    return proof.extended(checks, {**speed.UNMEASURED, **times})


def _verify_tflite(
    path: Path,
    against: Network | None,
    data: Data | str | None,
    config: VerifyConfig,
    original: Checkpoint | None,
    reporter: Reporter,
) -> Proof:
    """`verify` of a file of TensorFlow Lite. It is not timed: the ONNX file of its codes is no fast one."""
    targets.require_installed("tflite")
    from r2cli.deploy import tflite_export, tflite_run

    form = tflite_run.form(path)
    if against is None or (isinstance(against, str | Path) and Path(against).suffix == ".onnx"):
        raise InputError(f"{path} is proved against its checkpoint: name that with --against")
    made, source = _read(against, data)
    content = onnx_export.to_bytes(retarget(made, form.target), form)
    original = against.original if isinstance(against, Result) else original
    others = replace(config, runtime=[name for name in config.runtime if name != "tflite"])
    with scratch_folder() as folder:
        onnx = folder / path.with_suffix(".onnx").name
        onnx.write_bytes(content)
        proof = verify(onnx, made, source, others, original=original, timed=False, reporter=reporter)
        checks, usual = [tflite_run.same_tensors(path, tflite_export.to_bytes(content))], proof.measures["sqnr_db"]
        if usual is not None:
            checks.append(
                tflite_run.beside_onnx(path, onnx, proof_inputs.of_data(onnx, source).batches, usual_db=usual)
            )
    return proof.extended(checks, {"bytes": path.stat().st_size})


def _ran(proof: Proof) -> bool:
    """Whether the file ran in ONNX Runtime: else there is nothing to compare another runtime with."""
    return proof.measures["nodes"] is not None


def analyze(path: str | Path, config: AnalyzeConfig | None = None, *, reporter: Reporter = SILENT) -> list[Analysis]:
    """What the weights of a file lose at few bits: an analysis of each view of it (as trained, folded, decoded).

    Raises InputError for a file that cannot be read.
    """
    config = config or AnalyzeConfig()
    found = views.chosen(Path(path), config.view, everything=config.everything)
    layers = layer_table.matching([view.layers for view in found], config.only)
    with reporter.bar("analyze", sum(map(layer_table.total, layers))) as progress:
        return views.measured(found, layers, config, progress.advance)


def compare(
    reference: Network,
    candidate: Network,
    data: Data | str | None = None,
    config: CompareConfig | None = None,
    *,
    pictures: bool = False,
    reporter: Reporter = SILENT,
) -> Comparison:
    """Where a quantized network loses what its float network had, value by value, on test samples of `data`.

    `candidate` is a checkpoint, or a result, of `quantize`, `finetune` or `palettize`, or a quantized .onnx file of any
    tool's. Raises InputError where it is not of the network of `reference`.
    """
    config = config or CompareConfig()
    costs = None if config.cost is None else cost_table.read(config.cost)
    made, source = _read(reference, data)
    is_file = isinstance(candidate, str | Path) and Path(candidate).suffix == ".onnx"
    after = Path(candidate) if is_file else _checkpoint_of(candidate)  # type: ignore[arg-type]
    source = datasets.with_test_images(source, config.samples)
    metric = source.task.metric if source.measured else None
    meters = [] if metric is None else [metric.start(), metric.start()]
    targets_of: list[Any] = []
    with reporter.bar("compare", len(source.test)) as progress:

        def batches() -> Iterator[tuple[Given, Any]]:
            return source.test.batches(datasets.batch_that_fits(source.test, COMPARED_AT_ONCE), CPU)

        pair = pairing.graphs(made, after, (given for given, _ in batches()))

        def inputs_of() -> Iterator[Given]:
            for given, target in batches():
                targets_of[:] = [target]
                yield given
                progress.advance(count(given))

        def seen(*outputs: Given) -> None:
            for meter, own in zip(meters, outputs, strict=False):
                metrics.updated(metric, meter, metrics.by_name(own, made.outputs), targets_of[0])  # type: ignore[arg-type]

        gallery = depth_page.Gallery(*pair)
        found = depth.compare(pair, inputs_of(), seen, gallery.add if pictures else None)
        coded = {} if isinstance(after, Path) else after.coded
        worst = sorted(found.values, key=lambda value: value.cost)[: config.mend]
        mends = mending.measured(pair, worst, next(batches())[0], coded, costs) if worst else ()
    told = [metrics.value_of(metric, meter) for meter in meters] if metric is not None else [None, None]
    return Comparison(found, len(source.test), told[0], told[1], tuple(mends), gallery.found)


def _read(network: Network, data: Data | str | None, *, needed: bool = True) -> tuple[Checkpoint, Data]:
    """The checkpoint and the data that a function works on; noise of an .onnx file's shapes where none is `needed`.

    Raises InputError where there is no data for a module.
    """
    inputs.require_kinds(network, data)
    if isinstance(network, str | Path) and not isinstance(data, Data):
        return inputs.load(Inputs(source=Path(network), data=data), needed=needed, measures=True)
    if isinstance(network, nn.Module):
        if data is None:
            raise InputError(f"{type(network).__name__} needs the data that it is for: give a name or `load_data(...)`")
        source = datasets.load(data) if isinstance(data, str) else data
        return modules.checkpoint_of(network, source), source
    if isinstance(network, str | Path) and Path(network).suffix == ".onnx" and isinstance(data, Data):
        return inputs.of_onnx(Path(network), data), data
    made = _checkpoint_of(network)
    if isinstance(data, Data):
        return made, inputs.fitting(made.origin, made.input, made.class_names, data)
    named = data or datasets.named_in(made.history, made.origin)
    return made, datasets.load(named, spec=made.input, classes=made.class_names)


def _checkpoint_of(network: Network) -> Checkpoint:
    if isinstance(network, Checkpoint):
        return network
    if isinstance(network, Result | Pretrained):
        return network.checkpoint
    if isinstance(network, nn.Module):
        raise InputError("a module alone does not say how it is fed: give what `quantize` or `pretrain` returned")
    return earlier.by_todays_names(checkpoint.load(Path(network)))


@contextmanager
def _kept(state: Path | None) -> Iterator[Path]:
    """Where a run keeps its last whole epoch: the file that is given, or one that is gone afterwards."""
    with scratch_folder() as folder:
        yield state or folder / "state.safetensors"
