"""The contract of codecs and codes, for every method over its registry and every grid that it makes."""

from pathlib import Path

import pytest
import torch

from r2cli import data, registry
from r2cli.calibration import deployed, observers
from r2cli.config import values
from r2cli.palettes import compression, soft_training
from r2cli.ptq import post_training, weight_grids
from r2cli.qat import prepare
from r2cli.qat.prepare import QatSettings, QatTask
from r2cli.storage import checkpoint
from r2cli.train.loop import TrainSettings

CPU = torch.device("cpu")


def test_the_command_line_knows_what_there_is() -> None:
    assert values.ACT_RANGES == tuple(observers.OBSERVERS) and values.WEIGHT_RANGES == tuple(weight_grids.RANGES)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", post_training.GRANULARITIES)
@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2, 1])
@pytest.mark.parametrize("method", [name for name, entry in registry.PTQ_METHODS.items() if not entry.chooses])
def test_codes_survive_decoding_and_the_disk(
    method: str, bits: int, granularity: str, trained: Path, tmp_path: Path
) -> None:
    """With 20 steps where a method learns: the codes are others than the nearest, and need not be good ones."""
    source = data.load("digits", size=8)
    images = [batch for batch, _ in data.calibration(source, 64, CPU, 0)]
    made = checkpoint.load(trained)
    settings = post_training.PtqSettings(method, bits, 8, granularity, {}, steps=20)
    coded, _ = post_training.quantize(made, settings, images, CPU)
    _require_contract(coded, source, tmp_path)


# Bits, dim, group size and table of every kind of palette.
PALETTES = [(8, 1, None, 8), (4, 1, None, 8), (3, 1, None, 32), (2, 2, None, 8), (1, 1, 2, 8), (4, 4, None, 32)]


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "dim", "group", "lut_bits"), PALETTES)
@pytest.mark.parametrize("method", registry.PALETTE_METHODS)
def test_palettes_survive_decoding_and_the_disk(
    method: str, bits: int, dim: int, group: int | None, lut_bits: int, trained: Path, tmp_path: Path
) -> None:
    made = checkpoint.load(trained)
    source = data.load("digits:64", spec=made.input)  # one step of training
    settings = compression.PaletteSettings(method, bits, dim, group, lut_bits, None, {})
    work = compression.PaletteTask(made, settings, lambda: data.calibration(source, 64, CPU, 0), CPU, 0)
    if not registry.PALETTE_METHODS[method].trains:
        coded, _ = compression.by_kmeans(work, weigh=False, advance=lambda layers: None)
    else:
        loop = TrainSettings(1, 256, 0.01, 0.9, 0.0, 0.0, 0.0, 0.0, 0)
        plan = soft_training.PalettePlan(loop, soft_training.Schedule(1, 0, 0.5, 0.05), 1e-4, {"iterations": 2})
        following = soft_training.PaletteRunControl(
            tmp_path / "state", False, lambda steps: None, lambda epoch, gap: None
        )
        coded, _ = soft_training.by_training(work, plan, source, following)
    _require_contract(coded, source, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2, 1])
@pytest.mark.parametrize("method", sorted(registry.QAT_METHODS))
def test_learned_codes_survive_folding_and_the_disk(method: str, bits: int, trained: Path, tmp_path: Path) -> None:
    least, most = registry.QAT_METHODS[method].bits
    bits = min(max(bits, least), most)
    made = checkpoint.load(trained)
    source = data.load("digits", spec=made.input)
    settings = QatSettings(method, bits, bits, {})
    work = QatTask(made, settings, lambda: data.calibration(source, 64, CPU, 0), CPU)
    prepared = prepare.prepare(work)
    for _, learner, weight in prepared.each():
        assert torch.equal(learner(weight), learner.freeze(weight).decode())
    coded, _ = prepare.finish(work, prepared)
    _require_contract(coded, source, tmp_path)


def _require_contract(coded: checkpoint.Checkpoint, source: data.Data, tmp_path: Path) -> None:
    for name, one in coded.coded.items():
        assert torch.equal(one.codec.encode(one.decode()), one.codes), name
        assert one.codec.scale.dtype == torch.float32 and bool((one.codec.scale > 0).all()), name
    path = tmp_path / "coded.safetensors"
    checkpoint.save(coded, path)
    again = checkpoint.load(path)
    assert all(torch.equal(again.coded[name].codes, one.codes) for name, one in coded.coded.items())
    assert checkpoint.to_bytes(again) == path.read_bytes()
    batch, _ = next(source.test.batches(32, CPU))
    with torch.no_grad():
        assert torch.equal(deployed.network(coded)(batch), deployed.network(again)(batch))
