"""The contract of codecs and codes, for every method over its registry and every grid that it makes."""

from pathlib import Path

import pytest
import torch

from r2cli import attach, checkpoint, data, ptq

CPU = torch.device("cpu")


@pytest.mark.parametrize("granularity", ptq.GRANULARITIES)
@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2, 1])
@pytest.mark.parametrize("method", sorted(ptq.METHODS))
def test_codes_survive_decoding_and_the_disk(
    method: str, bits: int, granularity: str, trained: Path, tmp_path: Path
) -> None:
    source = data.load("digits", size=8)
    images = (batch for batch, _ in data.calibration(source, 64, CPU, 0))
    made = checkpoint.load(trained)
    coded, _ = ptq.quantize(made, ptq.Settings(method, bits, 8, granularity, {}), images, CPU)
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
        assert torch.equal(attach.network(coded)(batch), attach.network(again)(batch))
