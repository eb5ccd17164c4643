"""`r2 compare`: what arrives at each value, what each layer adds, and what that costs at the outputs."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from PIL import Image
from torch import Tensor, nn

import r2cli
from conftest import R2
from r2cli.analysis import depth, depth_page, mending, pairing
from r2cli.analysis.depth import Depth, Mend, ValueLoss
from r2cli.calibration.deployed import FakeQuantize
from r2cli.cli.compare import mended
from r2cli.deploy import runtime
from r2cli.errors import InputError
from r2cli.models import build
from r2cli.quantized.coded import Coded
from r2cli.quantized.decibels import sqnr
from r2cli.quantized.grid import Grid
from r2cli.quantized.packing import packed_bytes
from r2cli.storage import checkpoint
from r2cli.storage.checkpoint import Checkpoint, InputSpec, ModelSpec


class Residual(nn.Module):
    """Convolutions with norms, a sum of two ways, a product, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.wide, self.narrow = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)
        self.gate, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.narrow(torch.relu(self.wide(x)))
        x = x * torch.sigmoid(self.gate(x))
        return self.head(x.mean((2, 3)))


def _made(kind: type[nn.Module] = Residual) -> Checkpoint:
    torch.manual_seed(0)
    spec = ModelSpec("compare.py:factory", 4, factory=kind)
    model = build(spec)
    with torch.no_grad():
        for _ in range(2):
            model.train()(torch.randn(16, 3, 8, 8))
    state = {name: tensor.clone() for name, tensor in model.eval().state_dict().items()}
    return Checkpoint(spec, InputSpec(3, 8, 8, (0.0,) * 3, (1.0,) * 3), tuple("0123"), state)


MADE = _made()
IMAGES = [torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
DATA = r2cli.load_data([(images, torch.zeros(16, dtype=torch.int64)) for images in IMAGES])


def _quantized(**options: Any) -> Checkpoint:
    return r2cli.quantize(MADE, DATA, r2cli.PtqConfig(**options)).checkpoint


def _compared(candidate: Checkpoint | Path, made: Checkpoint = MADE) -> Depth:
    return depth.compare(pairing.graphs(made, candidate, IMAGES), IMAGES, lambda before, after: None)


def _worst(found: Depth, by: str = "cost") -> ValueLoss:
    return min(found.values, key=lambda value: float(getattr(value, by)))


def test_every_layer_and_every_other_grid_has_a_line_in_the_order_of_the_network() -> None:
    names = [value.name for value in _compared(_quantized()).values]
    assert names == ["x", "stem", "wide", "narrow", "add", "gate", "sigmoid", "mul", "adaptive_avg_pool2d", "head"]


def test_the_costs_add_up_to_what_arrives_at_the_outputs() -> None:
    for bits in (8, 4):
        found = _compared(_quantized(weight_bits=bits))
        total = -10 * math.log10(sum(10 ** (-value.cost / 10) for value in found.values))
        assert total == pytest.approx(found.outputs[0], abs=3)
        assert all(value.arriving <= value.own + 3 for value in found.values)


@torch.no_grad()
def test_a_cost_is_what_a_layer_that_alone_is_quantized_takes_from_the_outputs() -> None:
    candidate = _quantized(weight_bits=4)
    plain, made = pairing.graphs(MADE, candidate, IMAGES)
    grids = {path for path, module in made.named_modules() if isinstance(module, FakeQuantize)}
    layers = {path for path, module in made.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    rows = depth.rows_of(made)
    for value in _compared(candidate).values:
        own = {str(node.target) for node, name in rows.items() if name == value.name}
        alone = copy.deepcopy(made)
        for path in (grids | layers) - own:
            alone.set_submodule(path, nn.Identity() if path in grids else plain.get_submodule(path))
        lost = sqnr(*(torch.cat([net(images) for images in IMAGES]) for net in (alone, plain)))
        assert value.cost == pytest.approx(lost, abs=1.5), value.name


def _scaled(made: Checkpoint, name: str) -> Checkpoint:
    own = made.coded[name]
    return replace(
        made, coded={**made.coded, name: replace(own, codec=replace(own.codec, scale=own.codec.scale * 1.5))}
    )


def _flipped(made: Checkpoint, name: str) -> Checkpoint:
    own = made.coded[name]
    return replace(made, coded={**made.coded, name: replace(own, codes=-own.codes)})


def _narrow(made: Checkpoint, name: str) -> Checkpoint:
    own = made.activations[name]
    return replace(made, activations={**made.activations, name: replace(own, scale=own.scale / 16)})


def _coarse(made: Checkpoint, name: str) -> Checkpoint:
    own = made.activations[name]
    return replace(made, activations={**made.activations, name: replace(own, scale=own.scale * 32)})


def _moved(made: Checkpoint, name: str) -> Checkpoint:
    own = made.floats[name]
    return replace(made, floats={**made.floats, name: own + 3 * own.abs().max()})


@pytest.mark.parametrize(
    ("fault", "where", "row", "part"),
    [
        *(
            (fault, f"{name}.weight", name, "weights")
            for fault in (_scaled, _flipped)
            for name in ("stem", "wide", "head")
        ),
        *((_narrow, node, row, "clipping") for node, row in (("relu", "stem"), ("add", "add"), ("mul", "mul"))),
        *((_coarse, node, row, "rounding") for node, row in (("x", "x"), ("relu_1", "wide"))),
        *((_moved, f"{name}.bias", name, "bias") for name in ("stem", "narrow", "head")),
    ],
)
def test_a_fault_is_named_first_with_its_part(
    fault: Callable[[Checkpoint, str], Checkpoint], where: str, row: str, part: str
) -> None:
    found = _compared(fault(_quantized(), where))
    for by in ("cost", "own"):
        assert _worst(found, by).name == row
    assert min(_worst(found).parts, key=_worst(found).parts.__getitem__) == part
    assert found.worst()[0].name == row and len(found.worst()) == 1


def test_an_equalized_network_is_compared_with_the_equalized_float_network() -> None:
    found = _compared(_quantized(method="dfq"))
    assert all(value.arriving > 20 for value in found.values) and found.outputs[0] > 25


@pytest.mark.parametrize(
    "make",
    [
        lambda: r2cli.quantize(MADE, DATA, r2cli.PtqConfig(weight_bits=4, act_bits="none")).checkpoint,
        lambda: r2cli.palettize(MADE, DATA, r2cli.PalettizeConfig(method="kmeans", bits=2)).checkpoint,
        lambda: r2cli.finetune(MADE, DATA, r2cli.QatConfig(epochs=1, batch_size=16)).checkpoint,
    ],
    ids=["weights alone", "palettes", "qat"],
)
def test_whatever_was_made_of_a_network_is_compared(make: Callable[[], Checkpoint]) -> None:
    found = _compared(make())
    assert {"stem", "wide", "narrow", "gate", "head"} <= {value.name for value in found.values}
    assert all(math.isfinite(value.cost) for value in found.values if value.name in ("stem", "head"))
    assert 0 < found.outputs[0] < 60


def test_what_mends_a_layer_is_measured_by_changing_one_thing() -> None:
    few = _quantized(keep={"wide": 2}, granularity="tensor")
    mends = r2cli.compare(MADE, few, DATA, r2cli.CompareConfig(mend=1)).mends
    assert {mend.layer for mend in mends} == {"wide"}
    found = {mend.choice: mend for mend in mends}
    assert found["8 bits"].options == "--keep 'wide=8'" and found["8 bits"].bytes == 128 * 6 // 8
    assert found["float"].won >= found["8 bits"].won > found["3 bits"].won > 3
    mended = _compared(_quantized(keep={"wide": 8}, granularity="tensor")).outputs[0]
    assert found["8 bits"].outputs == pytest.approx(mended, abs=2)
    assert mends == tuple(sorted(mends, key=lambda mend: -mend.won / max(mend.bytes, 1)))


def test_bytes_are_those_of_the_file_where_codes_of_five_bits_take_as_many_as_of_eight() -> None:
    made = _quantized(weight_bits=4)
    mends = r2cli.compare(MADE, made, DATA, r2cli.CompareConfig(mend=5)).mends
    assert "8 bits" in {mend.choice for mend in mends} and "5 bits" not in {mend.choice for mend in mends}
    for mend in mends:
        keep = mend.options.removeprefix("--keep '").removesuffix("'")
        other = r2cli.quantize(MADE, DATA, r2cli.PtqConfig(weight_bits=4, keep=[keep])).checkpoint
        sizes = [_payload(one, mend.layer) for one in (made, other)]
        assert mend.bytes == sizes[1] - sizes[0] or "A16" in mend.options


def _payload(made: Checkpoint, layer: str) -> int:
    """The bytes of a layer's weight: of its codes, or as floats."""
    name = f"{layer}.weight"
    own = made.coded.get(name)
    return 4 * made.floats[name].numel() if own is None else packed_bytes(own.codes.numel(), own.codec.bits)


def test_a_grid_that_clips_is_mended_by_16_bits_for_what_reads_it() -> None:
    made = _narrow(_quantized(), "relu_1")
    mends = r2cli.compare(MADE, made, DATA, r2cli.CompareConfig(mend=1)).mends
    assert mends[0].options == "--keep 'narrow=A16'" and mends[0].won > 10 and mends[0].bytes == 0
    assert r2cli.PtqConfig(keep=["narrow=A16"]).keep  # which is what ptq takes
    assert r2cli.compare(MADE, made, DATA, r2cli.CompareConfig(mend=0)).mends == ()


class Chain(nn.Module):
    """A gate and a product by a number between two convolutions: 16 bits for the second are those of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.hardswish(self.first(x)) * 1.3 + 0.2
        return self.last(torch.relu(self.second(x))).flatten(1)


CHAIN, CHAIN_DATA = _made(Chain), r2cli.load_data([(IMAGES[0], torch.zeros(16, dtype=torch.int64))] * 2)
COARSE: dict[str, Any] = {"act_bits": 4, "act_range": "minmax"}


def _mended(layer: str, word: str) -> tuple[Mend, float]:
    """The choice as it is measured, and what arrives at the outputs where `r2 ptq` is told its --keep line."""
    coarse = r2cli.quantize(CHAIN, CHAIN_DATA, r2cli.PtqConfig(**COARSE))
    mends = r2cli.compare(CHAIN, coarse, CHAIN_DATA, r2cli.CompareConfig(mend=20)).mends
    mend = next(mend for mend in mends if mend.options == f"--keep '{layer}={word}'")
    made = r2cli.quantize(CHAIN, CHAIN_DATA, r2cli.PtqConfig(keep=[f"{layer}={word}"], **COARSE))
    pair = pairing.graphs(CHAIN, made.checkpoint, IMAGES)
    return mend, depth.compare(pair, IMAGES[:1], lambda before, after: None).outputs[0]


@pytest.mark.parametrize(
    ("layer", "word"), [("first", "A16"), ("second", "A16"), ("first", "float"), ("second", "float")]
)
def test_a_choice_is_what_its_keep_line_makes(layer: str, word: str) -> None:
    """16 bits for the second layer are those of the whole chain before it; float ones take the grids along."""
    mend, arrives = _mended(layer, word)
    assert mend.won > 0.5 and mend.outputs == pytest.approx(arrives, abs=0.3)


@pytest.mark.parametrize("value", ["first", "hardsigmoid", "mul", "mul_1", "add"])
def test_a_coarse_value_is_mended_by_16_bits_for_what_reads_a_function_of_it(value: str) -> None:
    """A layer's own output too, which no layer reads: 16 bits for the second layer are the only way to it."""
    coarse = r2cli.quantize(CHAIN, CHAIN_DATA, r2cli.PtqConfig(**COARSE)).checkpoint
    pair = pairing.graphs(CHAIN, coarse, IMAGES)
    row = next(one for one in _compared(coarse, CHAIN).values if one.name == value)
    found = [mend.options for mend in mending.measured(pair, [row, row], IMAGES[0], coarse.coded)]
    assert found.count("--keep 'second=A16'") == 1


def _mend(layer: str, won: float, **keep: str) -> Mend:
    return Mend(layer, "", 0.0, won, 0, None, keep)


def test_the_next_command_says_nothing_of_a_layer_that_it_makes_float() -> None:
    mends = [
        _mend("a", 3, b="A16"),
        _mend("b", 2, b="float"),
        _mend("b", 1, b="8"),
        _mend("c", 1, c="float"),
        _mend("d", 1, c="A16", e="A16"),
        _mend("e", 1, e="A16"),
    ]
    assert mended(mends) == ["--keep 'b=A16'", "--keep 'b=8'", "--keep 'c=float'", "--keep 'e=A16'"]


def test_choices_are_sorted_by_what_they_win_for_their_cost(tmp_path: Path) -> None:
    few, table = _quantized(keep={"wide": 2, "head": "float"}), tmp_path / "cost.csv"
    table.write_text("layer,width,cost\n*,W2A8,1\n*,W3A8,1.5\n*,W8A8,9\n*,W8A16,12\n*,float,20\nhead,float,2\n")
    config = r2cli.CompareConfig(mend=2, cost=table)
    mends = r2cli.compare(MADE, few, DATA, config).mends
    costs = {(mend.layer, mend.choice): mend.cost for mend in mends}
    assert {costs["wide", choice] for choice in ("3 bits", "8 bits", "float")} == {0.5, 8, 19}
    worth = [mend.won / max(math.inf if mend.cost is None else mend.cost, 1e-3 * 5) for mend in mends]
    assert worth == sorted(worth, reverse=True)
    table.write_text("layer,width,cost\nstem,8,1\n")
    with pytest.raises(InputError, match="no cost of 'wide' at 8"):
        r2cli.compare(MADE, few, DATA, config)


def test_16_bits_cost_what_every_layer_costs_that_reads_them(tmp_path: Path) -> None:
    table = tmp_path / "cost.csv"
    table.write_text("layer,width,cost\n*,8,1\n*,W8A16,3\n")
    made = _narrow(_quantized(), "relu")
    config = r2cli.CompareConfig(mend=1, cost=table)
    wide = next(mend for mend in r2cli.compare(MADE, made, DATA, config).mends if "A16" in mend.options)
    assert wide.layer == "stem" and (wide.cost, wide.options) == (2, "--keep 'wide=A16'")
    table.write_text("layer,width,cost\n*,8,1\n")
    wide = r2cli.compare(MADE, made, DATA, config).mends[-1]
    assert wide.choice == "16-bit activations" and wide.cost is None


def test_the_page_has_what_the_networks_compute(tmp_path: Path) -> None:
    made = _narrow(_quantized(weight_bits=2), "relu_1")
    found = r2cli.compare(MADE, made, DATA, pictures=True)
    assert list(found.pictures) == [value.name for value in found.depth.values]
    wide, mul = found.pictures["wide"], found.pictures["mul"]
    grid = made.activations["relu_1"]
    assert wide["values"]["ends"] == pytest.approx([0, 255 * float(grid.scale)]) and wide["values"]["bits"] == 8
    assert wide["values"]["high"] > wide["values"]["ends"][1]
    assert sum(wide["weights"]["floats"]) == sum(wide["weights"]["codes"]) == 128
    assert sum(count > 0 for count in wide["weights"]["codes"]) <= 64 and mul["weights"] is None
    assert wide["channels"][0][2] >= wide["channels"][-1][2] and len(wide["channels"]) == 8
    page = depth_page.to_bytes(found, "</script>m.onnx").decode()
    assert page.count("</script>") == 2 and "/*STYLE*/" not in page and '"name":"wide"' in page


def test_a_file_of_ours_is_compared_as_its_checkpoint_is(tmp_path: Path) -> None:
    few, equalized, weights = {"weight_bits": 4, "act_bits": 4}, {"method": "dfq"}, {"act_bits": "none"}
    kept = {"keep": {"wide": "W8A16", "head": "float"}}
    several: tuple[dict[str, Any], ...] = (few, equalized, weights, kept)
    for place, options in enumerate(several):
        made, file = _quantized(**options), tmp_path / f"{place}.onnx"
        r2cli.export(made, file)
        expected, found = _compared(made), _compared(file)
        assert [value.name for value in found.values] == [value.name for value in expected.values]
        for by in ("cost", "own", "arriving"):
            own, other = ([getattr(value, by) for value in each.values] for each in (found, expected))
            assert own == pytest.approx(other, abs=0.5)


class Images(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self.batches = iter([{"input": images.numpy()} for images in IMAGES])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.batches, None)


def _other_tools(folder: Path, form: QuantFormat, *, change: Callable[[onnx.ModelProto], None] | None = None) -> Path:
    """The network's float file, quantized by onnxruntime."""
    plain, made = folder / f"{form}.float.onnx", folder / f"{form}.onnx"
    r2cli.export(MADE, plain)
    quantize_static(plain, made, Images(), quant_format=form, per_channel=form == QuantFormat.QDQ)
    if change is not None:
        file = onnx.load(made)
        change(file)
        onnx.save(file, made)
    return made


@pytest.mark.parametrize("form", [QuantFormat.QDQ, QuantFormat.QOperator], ids=str)
def test_a_file_of_another_tool_is_matched_value_by_value(tmp_path: Path, form: QuantFormat) -> None:
    made = _other_tools(tmp_path, form)
    found = _compared(made)
    names = [value.name for value in found.values if value.name != "relu"]  # behind the grid of a BatchNorm
    assert names[:5] == ["x", "stem", "wide", "narrow", "add"] and {"gate", "sigmoid", "mul", "head"} <= {*names}
    own = runtime.runner(made, optimise=False, exact=False)(torch.cat(IMAGES))
    outputs = runtime.runner(tmp_path / f"{form}.float.onnx")(torch.cat(IMAGES))
    noise = float((own - outputs).square().sum() / outputs.square().sum())
    assert found.outputs[0] == pytest.approx(-10 * math.log10(noise), abs=0.5)
    assert all(math.isfinite(value.cost) for value in found.values if value.name in ("stem", "wide", "head"))


def _halved(name: str, file: onnx.ModelProto) -> None:
    held = next(each for each in file.graph.initializer if each.name == name)
    held.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(held) / 2, name))


@pytest.mark.parametrize("name", ["wide", "gate", "head"])
def test_a_fault_in_another_tools_file_is_named_first(tmp_path: Path, name: str) -> None:
    made = _other_tools(tmp_path, QuantFormat.QDQ, change=partial(_halved, f"{name}.weight_scale"))
    assert _worst(r2cli.compare(MADE, made, DATA).depth).name == name


def test_the_grid_of_a_weight_is_found_in_its_values_where_its_codes_are_not_known(tmp_path: Path) -> None:
    """A channel of one code alone, as where an outlier sets the range, does not hide that all are on one grid."""
    for options in ({"granularity": "tensor"}, {}, {"weight_bits": 4}, {"weight_bits": 3, "granularity": "tensor"}):
        made = _quantized(**options)
        grid = made.coded["wide.weight"].codec
        assert isinstance(grid, Grid)
        codes = torch.randint(grid.lowest, grid.highest + 1, (16, 8, 1, 1), generator=torch.Generator().manual_seed(0))
        codes[3:] //= 7
        codes[5], codes[0, :2, 0, 0] = 2, torch.tensor([grid.lowest, grid.highest])
        made = replace(made, coded={**made.coded, "wide.weight": Coded(grid, codes.to(torch.int8))})
        pair = pairing.graphs(MADE, made, IMAGES)
        told = []
        for known in (made.coded, {}):
            mends = mending.measured(pair, _compared(made).values, IMAGES[0], known)
            told.append([(mend.choice, mend.bytes) for mend in mends if mend.layer == "wide"])
        assert told[0] == told[1] and told[0]


def test_a_file_of_another_network_is_refused_by_its_first_value(tmp_path: Path) -> None:
    file, plain = tmp_path / "made.onnx", tmp_path / "float.onnx"
    r2cli.export(_quantized(), file)
    with pytest.raises(InputError, match="made.onnx is not of this network: the first value that differs is"):
        r2cli.compare(_made(Other), file, DATA)
    r2cli.export(MADE, plain)
    with pytest.raises(InputError, match="is a float network"):
        r2cli.compare(MADE, plain, DATA)


class Other(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def test_what_cannot_be_compared_is_refused() -> None:
    made = _quantized()
    with pytest.raises(InputError, match="is a float network: give what"):
        _compared(MADE)
    with pytest.raises(InputError, match="quantized already: give the float network first"):
        _compared(made, made)
    with pytest.raises(InputError, match="the first value that differs is 'add_1', there 'output'|one has more values"):
        _compared(made, _made(Other))
    with pytest.raises(InputError, match="there is no sample"):
        pairing.graphs(MADE, made, [])


def test_the_command_tells_what_the_function_finds(tmp_path: Path, r2: R2) -> None:
    plain = r2cli.pretrain("mobilenet_v1", "digits:64", r2cli.PretrainConfig(epochs=1)).checkpoint
    reference, candidate = tmp_path / "model.safetensors", tmp_path / "model.w4.safetensors"
    checkpoint.save(plain, reference)
    asked: dict[str, Any] = {"method": "dfq", "keep": ["stem=2"], "symmetric": False, "weight_range": "mse"}
    config = r2cli.PtqConfig(weight_bits=4, calibration=16, **asked)
    made = r2cli.quantize(plain, "digits:64", config).checkpoint
    checkpoint.save(made, candidate)
    line = ["compare", reference, candidate, "--samples", 8]
    told = json.loads(r2(*line, "--json").out)
    assert told["samples"] == 8 and told["metric"]["name"] == "top1"
    assert {layer["name"] for layer in told["layers"]} >= {"stem", "classifier"}
    shown = r2(*line, "--limit", 3, "--sort", "depth").out
    assert shown.splitlines()[1].startswith("x ") and "more: --limit 0 shows all" in shown and "next: r2 ptq" in shown
    # What is measured is one change of this candidate.
    assert "--method dfq --weight-range mse --asymmetric --keep stem=2 --keep" in shown
    alone = r2cli.quantize(plain, None, r2cli.PtqConfig(weight_bits=2, act_bits="none")).checkpoint
    checkpoint.save(alone, tmp_path / "alone.safetensors")
    assert "--act-bits none" in r2("compare", reference, tmp_path / "alone.safetensors", "--data", "digits:64").out
    picture = tmp_path / "compare.png"
    assert r2(*line, "-o", picture).out.count(f"wrote {picture}") == 1
    with Image.open(picture) as drawn:
        assert drawn.width > 500
    drawn_as_page = tmp_path / "compare.html"
    assert r2(*line, "-o", drawn_as_page).code == 0 and "r2 compare" in drawn_as_page.read_text()
    assert r2(*line, "-o", picture).code == 2 and r2(*line, "-o", "compare.gif").code == 2
    other = r2cli.pretrain("mobilenet_v1", "digits:64", r2cli.PretrainConfig(epochs=1, seed=1)).checkpoint
    checkpoint.save(other, tmp_path / "other.safetensors")
    ask = "was this file made of another float network?"
    assert ask in r2("compare", tmp_path / "other.safetensors", candidate, "--mend", 0).out and ask not in shown
    refused = r2("compare", reference, candidate.with_suffix(".tflite"))
    assert refused.code == 2 and "give the checkpoint beside it" in refused.err
    assert r2("compare", reference).code == 2
