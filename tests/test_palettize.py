"""r2 palettize: from a checkpoint to a proved ONNX file, by every method; any file of weights; and what it refuses."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conftest import R2, StoppedAt
from r2cli import data
from r2cli.calibration import deployed
from r2cli.cli.gates import ended_higher
from r2cli.data import losses
from r2cli.deploy import audit, onnx_export, verify
from r2cli.errors import InputError
from r2cli.graph import batchnorm, structure
from r2cli.graph.read import trace
from r2cli.palettes import compression, tables
from r2cli.palettes.tables import PaletteForm
from r2cli.quantized.palette import Palette
from r2cli.storage import checkpoint
from r2cli.train.loop import TrainSettings

CPU = torch.device("cpu")


@pytest.fixture
def model(trained: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(trained.read_bytes())
    return path


def _palettized(path: Path, form: PaletteForm, act_bits: int | None, images: bool = True) -> checkpoint.Checkpoint:
    made = checkpoint.load(path)
    source = data.load("digits", spec=made.input)
    settings = compression.PaletteSettings("kmeans", form.bits, form.dim, form.group, form.lut_bits, act_bits, {})
    batches = (lambda: data.calibration(source, 256, CPU, 0)) if images else None
    work = compression.PaletteTask(made, settings, batches, CPU, 0)
    return compression.by_kmeans(work, weigh=False, advance=lambda layers: None)[0]


# --- what weights matter -------------------------------------------------------------------------------------------


def test_a_short_last_batch_weighs_no_more_than_its_images() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
    x, labels = torch.randn(65, 20), torch.randint(0, 10, (65,))
    learned = losses.of_target(losses.CROSS_ENTROPY, ("logits",))

    def weight(*bounds: int) -> Tensor:
        batches = [(x[start:stop], labels[start:stop]) for start, stop in itertools.pairwise(bounds)]
        return compression.sensitivity(net, {"0": net[0]}, batches, learned)["0"]

    whole, last = weight(0, 64, 65), weight(64, 65)
    assert torch.allclose(whole, weight(0, 64) + last)
    assert float(last.sum() / whole.sum()) < 0.1


# --- tables --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 4, 7, 8])
def test_int8_tables_have_distinct_ascending_rows(bits: int) -> None:
    # Most centroids within a few steps of int8 of each other: rounding alone would make them coincide.
    centroids = torch.linspace(-1, 1, 2**bits).pow(5).reshape(1, -1, 1)
    palette = tables.palette(centroids, (2**bits, 1), PaletteForm(bits, 1, None, 8))
    rows = palette.lut[0, :, 0].int()
    assert palette.lut.dtype == torch.int8 and bool((rows[1:] > rows[:-1]).all())


@pytest.mark.parametrize("dim", [1, 2, 4])
@pytest.mark.parametrize("lut_bits", [8, 32])
def test_fewer_values_than_rows_are_kept_and_the_rest_are_fillers(dim: int, lut_bits: int) -> None:
    w = torch.tensor([[0.5, -1.0, 0.5, 0.25]]).repeat(4, 1)
    form = PaletteForm(4, dim, None, lut_bits)
    centroids, used = tables.start(w, form, None, torch.Generator())
    palette = tables.palette(centroids, w.shape, form)
    assert used == 3 and len({tuple(row) for row in palette.lut[0].tolist()}) == 16
    decoded = palette.decode(palette.encode(w))
    assert torch.allclose(decoded, w, atol=0 if lut_bits == 32 else 0.004)


def test_zero_and_constant_weights_have_palettes() -> None:
    for value in (0.0, 3.0):
        w, form = torch.full((4, 5), value), PaletteForm(2, 1, None, 8)
        palette = tables.palette(tables.start(w, form, None, torch.Generator())[0], w.shape, form)
        assert torch.allclose(palette.decode(palette.encode(w)), w, atol=0.05)


def test_huffman_as_worked_by_hand() -> None:
    assert tables.huffman_bits([4, 5, 3, 4]) == 32  # four lengths of 2 for 16 codes
    assert tables.huffman_bits([8, 4, 2, 2]) == 8 + 2 * 4 + 3 * 4
    assert tables.huffman_bits([0, 7]) == 7


# --- the network ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_negative_factors_become_positive_and_nothing_else_changes(model: Path) -> None:
    made = checkpoint.load(model)
    made.floats["norm.weight"][::2] *= -1
    batch, _ = next(data.load("digits", spec=made.input).test.batches(32, CPU))
    expected = deployed.network(made)(batch)
    net = trace(deployed.network(made), made.input.blank(2))
    batchnorm.make_factors_positive(net)
    assert float(net.get_parameter("norm.weight").detach().min()) >= 0
    assert torch.allclose(net(batch), expected, atol=1e-5)


def _with_one_large_filter(model: Path, times: float = 500) -> checkpoint.Checkpoint:
    """The network with a channel of large weights in its first layer, which BatchNorm makes up for, and a dead one."""
    made = checkpoint.load(model)
    made.floats["conv.weight"][2] *= times
    made.floats["norm.running_mean"][2] *= times
    made.floats["norm.running_var"][2] *= times**2
    made.floats["norm.running_var"][3] = 1e-9
    return made


@pytest.mark.slow
def test_divided_filters_compute_the_same(model: Path) -> None:
    made = _with_one_large_filter(model)
    made.floats["norm.running_var"][5] = 3e-6  # below BatchNorm's epsilon
    net = trace(deployed.network(made), made.input.blank(2))
    batch, _ = next(data.load("digits", spec=made.input).test.batches(32, CPU))
    expected = net(batch)
    first = structure.layers(net)[0]
    weight = net.get_parameter(first.weight).detach().clone()
    by = torch.logspace(-4, 4, len(weight))
    batchnorm.divide_filters(net, first, by)
    assert torch.allclose(net(batch), expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(net.get_parameter(first.weight), weight / by.reshape(-1, 1, 1, 1), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("times", [500, 1e6])
def test_outliers_do_not_take_a_table_of_two_rows(times: float, model: Path, tmp_path: Path) -> None:
    made, form = _with_one_large_filter(model, times), PaletteForm(1, 1, None, 8)
    w = made.floats["conv.weight"]
    plain = tables.palette(tables.start(w, form, None, torch.Generator())[0], w.shape, form)
    assert tables.constant_channels(plain, plain.encode(w)) > 0.9
    checkpoint.save(made, tmp_path / "large.safetensors")
    coded = _palettized(tmp_path / "large.safetensors", form, None, images=False).coded["conv.weight"]
    assert isinstance(coded.codec, Palette)
    assert tables.constant_channels(coded.codec, coded.codes) < 0.3
    before = _palettized(model, form, None, images=False).coded["conv.weight"]
    assert int((before.codes != coded.codes).sum()) < 0.4 * w.numel(), "nearly the codes without the large filter"


@pytest.mark.slow
def test_layers_that_it_does_not_help_stay_as_they_are(model: Path) -> None:
    made = checkpoint.load(model)
    names = [name for name in made.floats if name.endswith("conv1.weight")]
    made.floats[names[0]].zero_()
    signs = torch.where(torch.arange(len(made.floats[names[1]])) % 2 > 0, 1.0, -1.0).reshape(-1, 1, 1, 1)
    made.floats[names[1]].abs_().mul_(0.01).add_(signs)  # every filter of one sign
    settings = compression.PaletteSettings("kmeans", 1, 1, None, 8, None, {})
    subject = compression.read(made, settings)
    before = {name: structure.weight_of(module).detach().clone() for name, module in subject.layers.items()}
    wanted = compression.forms(subject.layers, settings)
    assert compression.even_out(subject, wanted) == {}
    for name, module in subject.layers.items():
        assert torch.equal(structure.weight_of(module), before[name]), name
    work = compression.PaletteTask(made, replace(settings, bits=2), None, CPU, 0)
    coded, _ = compression.by_kmeans(work, weigh=False, advance=lambda layers: None)
    assert not bool(coded.coded[names[0]].decode().any())


@pytest.mark.slow
def test_folding_changes_scales_and_no_code(model: Path) -> None:
    made = checkpoint.load(model)
    raw = _palettized(model, PaletteForm(3, 1, None, 8), None, images=False)
    net = trace(deployed.network(made), made.input.blank(2))
    batchnorm.make_factors_positive(net)
    for layer, module in structure.named_layers(net):
        w, form = module.weight.detach(), PaletteForm(3, 1, None, 8)
        palette = tables.palette(tables.start(w, form, None, torch.Generator())[0], w.shape, form)
        one = raw.coded[layer.weight]
        assert isinstance(one.codec, Palette)
        assert torch.equal(one.codes, palette.encode(w)) and torch.equal(one.codec.lut, palette.lut)
        assert one.codec.axis == (0 if layer.norm else None)


@pytest.mark.slow
def test_statistics_again_are_worth_more_than_any_method(model: Path) -> None:
    source = data.load("digits", spec=checkpoint.load(model).input)
    from r2cli.train import evaluation

    found = [
        evaluation.evaluate(
            deployed.network(_palettized(model, PaletteForm(1, 1, None, 8), None, images)), source.test, CPU
        )
        for images in (False, True)
    ]
    assert found[1] > found[0] + 30 and found[1] > 80


@pytest.mark.slow
def test_a_channel_that_never_varies_becomes_constant(model: Path) -> None:
    made = checkpoint.load(model)
    made.floats["conv.weight"][3] = 0
    made.floats["norm.running_var"][3] = 0
    made.floats["norm.running_mean"][3] = 0
    checkpoint.save(made, model)
    coded = _palettized(model, PaletteForm(4, 1, None, 8), 8, images=True)
    assert all(bool(torch.isfinite(one.decode()).all()) for one in coded.coded.values())


# --- ONNX ----------------------------------------------------------------------------------------------------------

FORMS = [
    *(PaletteForm(bits, 1, None, 8) for bits in (1, 2, 3, 4, 5, 8)),
    *(
        PaletteForm(2, 2, None, 8),
        PaletteForm(4, 4, None, 8),
        PaletteForm(3, 2, 4, 8),
        PaletteForm(2, 1, 2, 8),
        PaletteForm(1, 8, None, 8),
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_int8_tables_pass_their_proof_and_run_on_integers(form: PaletteForm, model: Path, tmp_path: Path) -> None:
    made, path = _palettized(model, form, 8), tmp_path / "model.onnx"
    path.write_bytes(onnx_export.to_bytes(made))
    batches = data.load("digits", spec=made.input).test.batches(256, CPU)
    proof = verify.prove(path, made, deployed.network(made), batches)
    assert proof.passed, proof.checks
    nodes = proof.measures["nodes"]
    assert nodes["QLinearConv"] == 9 and nodes["QGemm"] == 1
    assert not {"Conv", "FusedConv", "Gemm", "MatMul", "DequantizeLinear", "Gather"} & set(nodes)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS[:2], ids=str)
def test_a_file_is_little_more_than_its_palettes(form: PaletteForm, model: Path, tmp_path: Path) -> None:
    # Codes, what decodes them and biases; the text of the graph is 4 KB and about 1,700 bytes a layer more.
    made = _palettized(model, form, 8, images=True)
    content = onnx_export.to_bytes(made)
    file, parts = onnx.load_from_string(content), sum(one.payload_bytes() for one in made.coded.values())
    biases = sum(len(each.raw_data) for each in file.graph.initializer if ".bias." in each.name)
    assert parts + biases < len(content) <= parts + biases + 4096 + 1700 * len(made.coded)
    assert not file.functions and {node.domain for node in file.graph.node} == {""}
    assert set(made.coded) <= {name for node in file.graph.node for name in node.output}


@pytest.mark.slow
@pytest.mark.parametrize("form", [*FORMS[2:], *(replace(form, lut_bits=32) for form in FORMS[2:])], ids=str)
def test_weights_alone_pass_and_are_folded_when_they_are_loaded(form: PaletteForm, model: Path, tmp_path: Path) -> None:
    made, path = _palettized(model, form, None), tmp_path / "model.onnx"
    path.write_bytes(onnx_export.to_bytes(made))
    batches = data.load("digits", spec=made.input).test.batches(256, CPU)
    proof = verify.prove(path, made, deployed.network(made), batches)
    assert proof.passed, proof.checks
    assert not {"Gather", "Mul", "Transpose", "Cast", "DequantizeLinear"} & set(proof.measures["nodes"])


@pytest.mark.slow
def test_the_proof_sees_a_float_table_where_integers_were_promised(model: Path, tmp_path: Path) -> None:
    made, path = _palettized(model, PaletteForm(2, 1, None, 8), None), tmp_path / "model.onnx"
    file = onnx.load_from_string(onnx_export.to_bytes(made))
    lut = next(i for i in file.graph.initializer if i.name == "conv.weight.lut")
    assert lut.data_type == TensorProto.INT8
    lut.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(lut).astype("float32"), lut.name))
    onnx.save(file, path)
    assert not audit.all_integer(onnx.load(path), made.coded, made.floats).passed


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_kmeans_writes_a_proved_file_and_says_how_large(r2: R2, model: Path, tmp_path: Path) -> None:
    ran = r2("palettize", model, "--method", "kmeans", "--weigh", "fisher", "--keep", "classifier=8x1", "--json")
    report = json.loads(ran.out)
    assert ran.code == 0 and report["passed"] and report["top1"] > 90
    assert (tmp_path / "model.b4d1-kmeans.onnx").stat().st_size == report["bytes"]
    assert report["bits_per_weight"] < 32 / 5 and 0 < report["entropy_coded_bits"]
    assert {row["layer"]: row["bits"] for row in report["layers"]}["classifier"] == 8


@pytest.mark.slow
def test_dkm_trains_hardens_and_beats_kmeans(r2: R2, model: Path) -> None:
    usual = ("--bits", 1, "--json", "--max-drop", 100)
    plain = json.loads(r2("palettize", model, "--method", "kmeans", *usual).out)
    ran = r2("palettize", model, *usual)
    report = json.loads(ran.out)
    assert ran.code == 0 and report["passed"] and report["top1"] > plain["top1"] and report["top1"] > 90
    gaps = [epoch["gap"] for epoch in report["epochs"]]
    assert len(gaps) == 8 and gaps[0] > gaps[-3] > 0 and gaps[-2:] == [0, 0]
    assert report["options"]["method"] == "dkm" and report["options"]["temperature"] == 0.5


@pytest.mark.slow
def test_shared_weights_train_their_centroids(r2: R2, model: Path) -> None:
    ran = r2("palettize", model, "--bits", 2, "--method", "shared", "--epochs", 3, "--json")
    report = json.loads(ran.out)
    assert ran.code == 0 and report["passed"] and report["top1"] > 85


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_also_after_a_stop(
    r2: R2, stopped_at: StoppedAt, model: Path, tmp_path: Path
) -> None:
    command = ("palettize", model, "--bits", 2, "--dim", 2, "--epochs", 6, "-o")
    assert r2(*command, tmp_path / "a.safetensors").code == 0
    with stopped_at(45):  # in the middle of an epoch
        assert r2(*command, tmp_path / "b.safetensors").code == 130
    state = tmp_path / "b.resume.safetensors"
    assert state.exists() and not (tmp_path / "b.safetensors").exists()
    assert r2(*command, tmp_path / "b.safetensors", "--resume").code == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes() and not state.exists()


# --- any file ------------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "embed.weight": torch.randn(37, 24, generator=generator).to(torch.bfloat16),
        "layers.0.weight": torch.randn(300, 150, generator=generator) * 0.02,
        "layers.1.weight": torch.randn(16, 3, 5, 5, generator=generator).to(torch.float16),
        "norm.weight": torch.ones(24),
        "ids": torch.arange(7),
    }
    path = tmp_path / "llm.safetensors"
    save_file(tensors, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [(), ("--bits", 3), ("--bits", 2, "--dim", 4), ("--bits", 2, "--group-size", 4)])
@pytest.mark.parametrize("lut_bits", [8, 32])
def test_any_files_weights_are_palettized_as_the_tensors_in_memory_are(
    arguments: tuple[object, ...], lut_bits: int, r2: R2, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from r2cli.palettes import weight_files

    monkeypatch.setattr(weight_files, "PIECE", 1000)
    output = tmp_path / "small.safetensors"
    ran = r2("palettize", weights, *arguments, "--lut-bits", lut_bits, "-o", output, "--json")
    assert ran.code == 0, ran.err
    report, before, after = json.loads(ran.out), load_file(weights), checkpoint.load_state(output)
    assert set(before) == set(after) and torch.equal(before["ids"], after["ids"])
    assert torch.equal(before["norm.weight"], after["norm.weight"]) and report["bytes"] == output.stat().st_size
    coded, _ = checkpoint.load_coded(output)
    for row in report["layers"]:
        name = f"{row['layer']}.weight"
        w, form = before[name].float(), PaletteForm(row["bits"], row["dim"], None, lut_bits)
        error = float((after[name] - w).square().sum() / w.square().sum())
        assert row["sqnr"] == pytest.approx(-10 * torch.tensor(error).log10().item(), abs=0.01)
        # What was decoded is nearest in its own table.
        one = coded[name]
        assert torch.equal(one.codec.encode(w), one.codes)
        if form.dim == 1 and row["tables"] == 1:
            palette = tables.palette(tables.start(w, form, None, torch.Generator())[0], w.shape, form)
            least = float((palette.decode(palette.encode(w)) - w).square().sum() / w.square().sum())
            assert error == pytest.approx(least, rel=1e-3)
    analyzed = r2("analyze", output, "--json")
    assert analyzed.code == 0


def test_a_file_without_a_network_says_so_where_one_is_needed(r2: R2, weights: Path, tmp_path: Path) -> None:
    output = tmp_path / "small.safetensors"
    assert r2("palettize", weights, "-o", output).code == 0
    assert "holds palettes of a file without a network" in r2("evaluate", output).err
    again = r2("palettize", output)
    assert again.code == 2 and "without a network" in again.err
    assert r2("palettize", weights, "-o", output, "--overwrite", "--max-bytes", 10).code == 1


# --- bad input -----------------------------------------------------------------------------------------------------

REFUSED = [
    (("--bits", 9), "--bits 9 is impossible"),
    (("--bits", 0), "--bits 0 is impossible"),
    (("--dim", 3), "--dim 3 is impossible: give 1, 2, 4 or 8"),
    (("--lut-bits", 16), "--lut-bits 16 is impossible"),
    (("--method", "kmean"), "did you mean 'kmeans'"),
    (("--keep", "classifer=8"), "did you mean 'classifier'"),
    (("--keep", "classifier"), "is not PATTERN=BITS"),
    (("--keep", "classifier=8x3"), "is impossible"),
    (("--group-size", 7), "--group-size 7 divides no layer's output channels"),
    (("--group-size", 2, "--dim", 4), "--group-size 2 is no multiple of the 4 channels"),
    (("--lut-bits", 32, "--act-bits", 8), "--act-bits 8 needs integer weights"),
    (("--act-bits", 3), "--act-bits 3 is impossible"),
    (("--calibration", 0), "--calibration 0 leaves no images"),
    (("--calibration", 5000), "is more than digits has"),
    (("--weigh", "fisher"), "--weigh fisher belongs to --method kmeans"),
    (("--weigh", "hessian", "--method", "kmeans"), "unknown --weigh"),
    (("--epochs", 2, "--hard-epochs", 2), "leaves none of --epochs 2 soft"),
    (("-o", "x.onnx"), "must end in .safetensors"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=lambda value: str(value))
def test_what_cannot_be_done_is_one_sentence(
    arguments: tuple[object, ...], message: str, r2: R2, model: Path, tmp_path: Path
) -> None:
    ran = r2("palettize", model, *arguments)
    assert ran.code == 2 and message in ran.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]


def test_a_vector_longer_than_a_layer_has_channels_is_refused_with_a_way_out() -> None:
    with pytest.raises(InputError, match=r"--dim 8 is more than the 5 output channels of 'fc.weight'.*'fc=4x4'"):
        tables.require_fit("fc.weight", (5, 7), PaletteForm(4, 8, None, 8))


@pytest.mark.slow
def test_a_coded_checkpoint_a_missing_file_and_damaged_ones_are_named(r2: R2, model: Path, tmp_path: Path) -> None:
    assert r2("palettize", model, "--method", "kmeans").code == 0
    coded = tmp_path / "model.b4d1-kmeans.safetensors"
    assert "is quantized already" in r2("palettize", coded).err
    assert "is there already" in r2("palettize", model, "--method", "kmeans").err
    missing = r2("palettize", tmp_path / "none.safetensors")
    assert missing.code == 2 and "none.safetensors does not exist" in missing.err
    save_file({"a.weight": torch.tensor([[1.0, float("nan")]])}, tmp_path / "nan.safetensors")
    damaged = r2("palettize", tmp_path / "nan.safetensors")
    assert damaged.code == 2 and "nan.safetensors: tensor 'a.weight' has NaN or infinite values" in damaged.err
    assert not (tmp_path / "nan.b4d1-kmeans.safetensors").exists()
    save_file({"a": torch.ones(3)}, tmp_path / "vector.safetensors")
    gate = r2("palettize", tmp_path / "vector.safetensors", "--max-drop", 1)
    assert gate.code == 2 and "weights alone, without a network to measure: leave out --max-drop" in gate.err
    assert "has no floating tensor of two dimensions" in r2("palettize", tmp_path / "vector.safetensors").err
    trained = r2("palettize", tmp_path / "vector.safetensors", "--method", "dkm")
    assert trained.code == 2 and "needs a network and its data" in trained.err


@pytest.mark.slow
def test_training_that_diverges_says_so_and_leaves_nothing(r2: R2, model: Path, tmp_path: Path) -> None:
    ran = r2("palettize", model, "--lr", 1e6, "--epochs", 3)
    assert ran.code == 3 and "diverged in epoch" in ran.err and "lower --lr" in ran.err
    assert not list(tmp_path.glob("*.onnx"))


def test_training_that_ends_higher_than_it_began_says_so() -> None:
    (told,) = ended_higher([2.42, 1.6, 2.53], mend="--clip-ratio or --lr")
    assert told == "the last epoch's loss is above the first one's (2.53, 2.42): lower --clip-ratio or --lr"
    assert not ended_higher([0.7, 0.2], mend="--lr") and not ended_higher([], mend="--lr")


@pytest.mark.slow
def test_a_resumed_run_must_have_the_same_options(r2: R2, model: Path, tmp_path: Path) -> None:
    made = checkpoint.load(model)
    state = tmp_path / "model.b2d1-dkm.resume.safetensors"
    from r2cli.palettes import soft_training

    source = data.load("digits", spec=made.input)
    settings = compression.PaletteSettings("dkm", 2, 1, None, 8, 8, {})
    work = compression.PaletteTask(made, settings, lambda: data.calibration(source, 512, CPU, 0), CPU, 0)
    loop = TrainSettings(8, 64, 0.02, 0.9, 4e-5, 0.05, 0.0, 0.0, 0, clip_grad=5.0, clip_ratio=0.3)
    plan = soft_training.PalettePlan(replace(loop, epochs=1), soft_training.Schedule(1, 0, 0.5, 0.05), 1e-4)
    soft_training.by_training(
        work, plan, source, soft_training.PaletteRunControl(state, False, lambda steps: None, lambda epoch, gap: None)
    )
    ran = r2("palettize", model, "--bits", 2, "--epochs", 1, "--hard-epochs", 0, "--temperature", 0.3, "--resume")
    assert ran.code == 2 and "was made with --temperature 0.5, not 0.3" in ran.err
    assert "holds a stopped run" in r2("palettize", model, "--bits", 2).err
