"""Training with quantizers: where they stand, what is frozen, and that the ONNX file is what was trained."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import R2, StoppedAt
from r2cli import data, models, registry
from r2cli.calibration import deployed
from r2cli.deploy import onnx_export, verify
from r2cli.errors import R2Error
from r2cli.graph import batchnorm, structure
from r2cli.graph.read import trace
from r2cli.qat import ewgs, finetune, lsq, oscillation, prepare, quantizer_placement
from r2cli.qat.prepare import INPUTS, OUTPUTS, QatSettings, QatTask, TrainedLayer
from r2cli.qat.qat_method import EpochStart
from r2cli.qat.quantizers import ActivationQuantizer, WideQuantizer
from r2cli.quantized.coded import Coded
from r2cli.quantized.decibels import sqnr
from r2cli.quantized.grid import Grid
from r2cli.storage import checkpoint
from r2cli.storage.checkpoint import Checkpoint, ModelSpec
from r2cli.train import evaluation, hooks
from r2cli.train.hooks import Epoch
from r2cli.train.loop import TrainSettings

CPU = torch.device("cpu")
LOOP = TrainSettings(2, 64, 0.02, 0.9, 2.5e-5, 0.05, 0.0, 0.0, 0)


@pytest.fixture
def model(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(trained, tmp_path / "model.safetensors"))


def work_on(path: Path, method: str, bits: int, acts: int | None, **more: Any) -> tuple[QatTask, data.Data]:
    made = checkpoint.load(path)
    source = data.load("digits", spec=made.input)
    settings = QatSettings(method, bits, acts, {}, **more)
    return QatTask(made, settings, lambda: data.calibration(source, 256, CPU, 0), CPU), source


def trained_to(
    path: Path, method: str, bits: int, acts: int | None, tmp_path: Path, plan: finetune.QatPlan | None = None
) -> tuple[Checkpoint, float, list[TrainedLayer]]:
    work, source = work_on(path, method, bits, acts)
    plan = plan or finetune.QatPlan(LOOP, 1e-3 if method == "ewgs" else 0.02)
    watch = hooks.Progress(lambda steps: None, lambda epoch: None)
    following = hooks.RunControl(tmp_path / "state.safetensors", False, watch)
    coded, rows, history = finetune.by_training(work, plan, source, following)
    top1 = history[-1].top1
    assert top1 is not None
    return coded, top1, rows


# --- where quantizers stand ----------------------------------------------------------------------------------------


def placed(
    name: str, *, inputs: bool, shape: tuple[int, ...] = (3, 32, 32), bits: int = 2
) -> dict[str, quantizer_placement.Place]:
    net = trace(models.build(ModelSpec(name, 10, channels=shape[0], stem="small")), torch.zeros(2, *shape))
    batchnorm.remove_norms(net)
    each = {layer.name: bits for layer in structure.layers(net)}
    return {place.value: place for place in quantizer_placement.places(net, shape, each, inputs=inputs)}


@pytest.mark.slow
def test_what_enters_a_sum_is_wide_and_layers_read_their_levels_behind_it() -> None:
    found = placed("resnet18", inputs=False)
    assert found["x"] == quantizer_placement.Place("x", wide=True)
    block = found["layer1_0_relu_1"]  # what the next block's first layer reads, and its sum
    assert block.wide and block.low == 2 and block.shared
    inner = found["layer1_0_relu"]
    assert not inner.wide and inner.low == 2 and not inner.shared
    assert found["layer1_0_conv2"] == quantizer_placement.Place("layer1_0_conv2", wide=True)
    assert found["avgpool"].low == 2 and found["layer4_1_relu_1"] == quantizer_placement.Place(
        "layer4_1_relu_1", wide=True
    )


@pytest.mark.slow
def test_the_papers_placement_is_on_what_layers_read() -> None:
    found = placed("resnet18", inputs=True)
    assert {place.value for place in found.values() if place.wide} == {"x"}
    assert "layer1_0_conv2" not in found and found["layer1_0_relu_1"].shared and found["layer1_0_relu"].low == 2


@pytest.mark.slow
def test_at_8_bits_a_sums_grid_serves_layers_too() -> None:
    found = placed("resnet18", inputs=False, bits=8)
    assert found["layer1_0_relu_1"] == quantizer_placement.Place("layer1_0_relu_1", wide=True)
    assert found["layer1_0_relu"] == quantizer_placement.Place("layer1_0_relu", low=8)


@pytest.mark.slow
def test_a_max_pool_between_keeps_both_grids_where_they_belong() -> None:
    net = trace(models.build(ModelSpec("resnet18", 10, channels=3, stem="imagenet")), torch.zeros(2, 3, 64, 64))
    batchnorm.remove_norms(net)
    each = {layer.name: 2 for layer in structure.layers(net)}
    found = {p.value: p for p in quantizer_placement.places(net, (3, 64, 64), each, inputs=False)}
    assert found["relu"] == quantizer_placement.Place("relu", wide=True)
    assert found["maxpool"] == quantizer_placement.Place("maxpool", low=2, shared=True)


def test_quantizers_take_over_the_relus_before_them(model: Path) -> None:
    work, _ = work_on(model, "lsq", 2, 2)
    prepared = prepare.prepare(work)
    wide = prepared.net.get_submodule("learners.relu.wide")
    assert isinstance(wide, WideQuantizer) and wide.rectifies and prepared.edges["stages_0_0_relu1"].rectifies
    left = [node for node in prepared.net.graph.nodes if node.target is torch.nn.functional.relu]
    assert len(left) == 1  # the last block's, which the wide grid alone reads


@pytest.mark.slow
def test_a_range_below_zero_has_a_zero_point_and_the_input_is_never_cut_at_zero(tmp_path: Path) -> None:
    source = data.load("digits", size=16)
    model = models.build(ModelSpec("mobilenet_v2", 10, channels=1, stem="small", width=0.25))
    made = Checkpoint(
        ModelSpec("mobilenet_v2", 10, 1, "small", 0.25), source.input, source.class_names, model.state_dict()
    )
    work = QatTask(made, QatSettings("lsq", 4, 4, {}), lambda: data.calibration(source, 64, CPU, 0), CPU)
    prepared = prepare.prepare(work)
    given = prepared.edges["x"]
    assert isinstance(given, WideQuantizer) and given.zero > 0
    signed = [edge for edge in prepared.edges.values() if isinstance(edge, ActivationQuantizer) and edge.zero > 0]
    assert signed and all(0 < edge.zero < 15 for edge in signed)


# --- what is trained is what is frozen, and what is exported -------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(registry.QAT_METHODS))
def test_two_bits_train_and_run_on_integers(method: str, model: Path, tmp_path: Path) -> None:
    coded, top1, rows = trained_to(model, method, 2, 2, tmp_path)
    source, path = data.load("digits", spec=coded.input), tmp_path / "model.onnx"
    assert top1 > 80
    path.write_bytes(onnx_export.to_bytes(coded))
    proof = verify.prove(path, coded, deployed.network(coded), source.test.batches(256, CPU))
    assert proof.passed, proof.checks
    one_image = 100 / len(source.test)
    assert proof.measures["agreement"] >= 99.5
    assert abs(proof.measures["top1"] - proof.measures["torch_top1"]) <= one_image + 1e-9
    nodes = proof.measures["nodes"]
    assert nodes["QLinearConv"] == 9 and nodes["QLinearAdd"] == 3
    assert not {"Conv", "FusedConv", "Gemm", "MatMul", "Add", "Relu"} & set(nodes)
    assert {row.bits for row in rows} == {2} and {row.act_bits for row in rows} == {8, 2}


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(registry.QAT_METHODS))
def test_the_network_that_trained_is_the_one_that_is_frozen(method: str, model: Path) -> None:
    """In evaluation: weights are their codes', values their grids', logits the same but for the biases' int32 grid."""
    work, source = work_on(model, method, 2, 2)
    prepared = prepare.prepare(work)
    quantizer_placement.watch(prepared, (images for images, _ in work.batches()), norms=True)
    images, _ = next(source.test.batches(64, CPU))
    with torch.no_grad():
        expected = prepared.net.eval()(images)
        for layer, learner, weight in prepared.each():
            module = prepared.model.get_submodule(layer.name)
            assert torch.equal(structure.weight_of(module), learner.freeze(weight).decode())
        coded, _ = prepare.finish(work, prepared, round_biases=False)
        found = deployed.network(coded)(images)
    # Sums are in another order, so that a value on the edge of two levels may take the other one: in few images.
    same = [sqnr(*pair) > 60 for pair in zip(found, expected, strict=True)]
    assert sum(same) >= 0.85 * len(same)  # 61 of 64 at the least seen


@pytest.mark.parametrize("midrise", [False, True], ids=["plain", "midrise"])
def test_folding_changes_no_integer_but_its_sign(midrise: bool) -> None:
    codes = torch.randint(0, 4, (6, 3, 3, 3), generator=torch.Generator().manual_seed(0)) - (0 if midrise else 2)
    codes[1] = codes[1].clamp_min(1 if midrise else -1)  # a channel without the lowest code
    grid = Grid(torch.tensor(0.5), torch.tensor(0, dtype=torch.int32), 2, signed=True, midrise=midrise)
    coded = Coded(grid, codes.to(torch.uint8 if midrise else torch.int8))
    factor = torch.tensor([0.1, 2.0, 3.0, 0.5, 1.0, 4.0], dtype=torch.float64)
    negative = torch.tensor([True, True, False, True, False, False])
    folded = prepare.fold(coded, factor, negative)
    signed = torch.where(negative, -factor, factor).reshape(-1, 1, 1, 1)
    assert torch.allclose(folded.decode().double(), coded.decode() * signed, rtol=1e-6)
    assert bool((folded.codec.scale > 0).all()) and torch.equal(folded.codec.encode(folded.decode()), folded.codes)
    assert isinstance(folded.codec, Grid)
    assert torch.equal(folded.codec.integers(folded.codes).abs(), grid.integers(coded.codes).abs())
    assert (folded.codec.zero_point != 0).tolist() == [not midrise, False, False, not midrise, False, False]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lsq", "ewgs"])
def test_a_gamma_that_turned_negative_in_training_is_exported(method: str, model: Path, tmp_path: Path) -> None:
    work, source = work_on(model, method, 2, 4)
    prepared = prepare.prepare(work)
    with torch.no_grad():
        for layer in prepared.layers:
            if layer.norm:
                prepared.net.get_parameter(f"{layer.norm}.weight")[::3] *= -1
    quantizer_placement.watch(prepared, (images for images, _ in work.batches()), norms=True)
    images, _ = next(source.test.batches(64, CPU))
    expected = prepared.net.eval()(images).detach()
    coded, rows = prepare.finish(work, prepared)
    assert sqnr(deployed.network(coded)(images).detach(), expected) > 15
    assert any("turned around" in row.note for row in rows)
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_export.to_bytes(coded))
    proof = verify.prove(path, coded, deployed.network(coded), source.test.batches(256, CPU))
    assert proof.passed and proof.measures["nodes"]["QLinearConv"] == 9


def proved_untrained(work: QatTask, source: data.Data, tmp_path: Path) -> tuple[Checkpoint, verify.Proof]:
    """The codes that learners start with, and the proof of their file, which holds."""
    prepared = prepare.prepare(work)
    quantizer_placement.watch(prepared, (images for images, _ in work.batches()), norms=True)
    coded, _ = prepare.finish(work, prepared)
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_export.to_bytes(coded))
    proof = verify.prove(path, coded, deployed.network(coded), source.test.batches(256, CPU))
    assert proof.passed, proof.checks
    return coded, proof


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "bits", "acts"),
    [("lsq", 8, 8), ("pact", 4, 4), ("ewgs", 1, 1), ("dorefa", 3, None), ("seq", 2, 2), ("seq", 1, 8)],
)
def test_other_bits_pass_their_proof(method: str, bits: int, acts: int | None, model: Path, tmp_path: Path) -> None:
    coded, _ = proved_untrained(*work_on(model, method, bits, acts), tmp_path)
    assert bool(coded.activations) == (acts is not None)


@pytest.mark.slow
@pytest.mark.parametrize("place", [OUTPUTS, INPUTS])
def test_what_either_placement_leaves_in_float_is_announced(place: str, model: Path, tmp_path: Path) -> None:
    _, proof = proved_untrained(*work_on(model, "lsq", 4, 4, activations=place), tmp_path)
    kinds = {each["kind"] for each in proof.measures["float_operations"]}
    assert kinds == (set() if place == OUTPUTS else {"sum", "ReLU", "mean", "convolution"})


# --- the options ---------------------------------------------------------------------------------------------------


def test_kept_layers_have_their_bits_and_read_as_many(model: Path) -> None:
    work, _ = work_on(model, "lsq", 2, 2)
    work = replace(work, settings=replace(work.settings, keep={"conv": 8, "classifier": 8}))
    _, rows = prepare.finish(work, prepare.prepare(work))
    bits = {row.layer: (row.bits, row.act_bits) for row in rows}
    assert bits["conv"] == (8, 8) and bits["classifier"] == (8, 8) and bits["stages.1.0.conv1"] == (2, 2)


def test_bits_come_down_by_stages() -> None:
    assert [finetune.bits_at(number, 6, 2) for number in range(1, 7)] == [8, 8, 4, 4, 2, 2]
    assert [finetune.bits_at(number, 4, 4) for number in range(1, 5)] == [8, 8, 4, 4]
    assert [finetune.bits_at(number, 3, 8) for number in range(1, 4)] == [8, 8, 8]
    # The last epoch has the wanted bits, however few there are.
    assert [finetune.bits_at(number, 3, 2) for number in range(1, 4)] == [8, 4, 2]
    assert [finetune.bits_at(number, 2, 2) for number in range(1, 3)] == [4, 2]
    assert finetune.bits_at(1, 1, 2) == 2


def test_bin_regularization_draws_weights_to_their_levels() -> None:
    w = torch.tensor([0.5, -1.25, 0.2, 1.0, -0.4, -0.6, 0.1], dtype=torch.float64)
    value, gradient = lsq.bins(w, torch.tensor(0.5, dtype=torch.float64), (-2, 1))
    assert value.item() == pytest.approx(0.2225)
    assert gradient.tolist() == pytest.approx([0, -0.5, 0.2, 0.5, 0.1, -0.1, 0.1])


def test_dampening_draws_weights_to_their_levels_but_not_those_outside() -> None:
    w = torch.tensor([0.5, -1.25, 0.2, 1.0, -0.4], dtype=torch.float64)
    value, gradient = oscillation.dampening(w, torch.tensor(0.5, dtype=torch.float64), (-2, 1))
    assert value.item() == pytest.approx(0.05) and gradient.tolist() == pytest.approx([0, 0, 0.4, 0, 0.2])
    assert [oscillation.share_at(number, 3) for number in (1, 2, 3)] == pytest.approx([0, 0.5, 1])
    assert [oscillation.threshold(0.01, number, 3) for number in (1, 3)] == pytest.approx([0.04, 0.01])


def test_a_weight_that_turns_back_is_held_at_the_code_of_most_steps() -> None:
    seen = oscillation.Oscillation(torch.tensor([0.0, 0.0, 1.0]))
    for number in range(12):  # the first swings between 0 and 1, and is at 0 mostly; the second climbs; the third rests
        seen.observe(torch.tensor([float(number % 3 == 1), float(number), 1.0]), most=0.04)
    assert seen.held.tolist() == [True, False, False]  # 0.01 for every turn: the fifth is above 0.04
    w, step = torch.tensor([0.9, 0.7, 0.1], requires_grad=True), torch.tensor(0.5)
    used = seen.used(w, step)
    assert used.tolist() == pytest.approx([0.0, 0.7, 0.1])
    used.sum().backward()
    assert w.grad is not None and w.grad.tolist() == [0.0, 1.0, 1.0]


def test_the_hessians_trace_sets_delta() -> None:
    hessian = torch.tensor([[2, 0.5, 0], [0.5, 1, 0], [0, 0, 3.0]])
    x = torch.tensor([0.2, -0.4, 1.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(0.5 * x @ hessian @ x, x, create_graph=True)
    assert gradient.tolist() == pytest.approx([0.2, -0.3, 3.0])
    assert ewgs.delta_of(6.0, gradient.detach()) == pytest.approx(0.3748316564)
    found = ewgs.traces([gradient], [x], torch.Generator().manual_seed(0))
    assert found[0] == pytest.approx(6.0, abs=0.6)


@pytest.mark.slow
def test_deltas_from_the_hessian_of_a_network(model: Path) -> None:
    work, _ = work_on(model, "ewgs", 2, 2)
    prepared = prepare.prepare(work)
    options = registry.EwgsOptions(delta=None)
    learners = [*prepared.weights.values(), *prepared.activations]
    ewgs.before_epoch(prepared, EpochStart(1, 2, 0, work.batches, options))
    assert all(float(learner.get_buffer("delta")) == 0 for learner in learners)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ewgs, "PROBES", 2)
        ewgs.before_epoch(prepared, EpochStart(2, 2, 0, work.batches, options))
    deltas = [float(learner.get_buffer("delta")) for learner in learners]
    assert max(deltas) > 0 and min(deltas) >= 0 and all(torch.isfinite(torch.tensor(deltas)))
    images, _ = next(iter(work.batches()))
    assert prepared.net(images).requires_grad  # back in the usual operations


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_writes_a_proved_file(r2: R2, model: Path, tmp_path: Path) -> None:
    arguments = ("--weight-bits", 2, "--act-bits", 2, "--epochs", 3, "--distill", 1, "--progressive", "--bin-reg", 1e-4)
    ran = r2("qat", model, *arguments, "--json")
    report = json.loads(ran.out)
    assert ran.code == 0 and report["passed"] and report["top1"] > 80
    assert (tmp_path / "model.w2a2-lsq.onnx").stat().st_size == report["bytes"]
    assert report["options"]["distill"] == 1 and 2 < report["bits_per_weight"] < 3
    assert not list(tmp_path.glob("*resume*"))
    again = r2("qat", tmp_path / "model.w2a2-lsq.safetensors")
    assert again.code == 2 and "is quantized already" in again.err
    assert "is there already" in r2("qat", model, *arguments).err


@pytest.mark.slow
def test_from_scratch_with_a_regularizer(r2: R2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scratch = ("--from-scratch", "--model", "resnet8", "--size", 8, "--reg", "linf", "--method", "pact")
    gate = r2("qat", *scratch, "--min-sqnr", 3)
    assert gate.code == 2 and "has no float network to compare with: leave out --min-sqnr" in gate.err
    ran = r2("qat", *scratch, "--act-bits", 4, "--epochs", 3, "--lr", 0.1, "--json")
    report = json.loads(ran.out)
    assert ran.code == 0 and report["top1"] > 50 and report["float_top1"] is None
    assert report["epochs"][0]["penalty"] > 0


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_also_after_a_stop(
    r2: R2, stopped_at: StoppedAt, model: Path, tmp_path: Path
) -> None:
    command = ("qat", model, "--weight-bits", 2, "--act-bits", 2, "--epochs", 3, "--method", "ewgs", "-o")
    assert r2(*command, tmp_path / "a.safetensors").code == 0
    with stopped_at(25):  # in the middle of an epoch
        assert r2(*command, tmp_path / "b.safetensors").code == 130
    state = tmp_path / "b.resume.safetensors"
    assert state.exists() and not (tmp_path / "b.safetensors").exists()
    assert r2(*command, tmp_path / "b.safetensors", "--resume").code == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes() and not state.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "ema", "more"),
    [
        ("lsq", None, {}),
        ("pact", None, {}),
        ("lsq", None, {"progressive": True}),
        ("lsq", 0.9, {"options": {"dampen": 1e-2, "freeze": 0.005}}),
    ],
    ids=["lsq", "pact", "progressive", "calm and averaged"],
)
def test_a_resumed_run_goes_on_with_its_quantizers(
    method: str, ema: float | None, more: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    loop = replace(LOOP, epochs=3, ema=ema)
    plan = finetune.QatPlan(loop, 0.02, **more)
    whole, top1, _ = trained_to(model, method, 2, 2, tmp_path, plan)

    class Stop(Exception):
        pass

    def stop(epoch: Epoch) -> None:
        raise Stop

    work, source = work_on(model, method, 2, 2)
    state = tmp_path / "stopped.safetensors"
    for _ in range(2):
        with pytest.raises(Stop):
            watch = hooks.Progress(lambda steps: None, stop)
            finetune.by_training(work, plan, source, hooks.RunControl(state, True, watch))
    watch = hooks.Progress(lambda steps: None, lambda epoch: None)
    resumed, _, _ = finetune.by_training(work, plan, source, hooks.RunControl(state, True, watch))
    assert checkpoint.to_bytes(resumed) == checkpoint.to_bytes(whole)
    found = evaluation.of_task(deployed.network(whole), source, CPU)
    assert found is not None and found.top1 == pytest.approx(top1, abs=1.0)  # what was evaluated is what is kept


# --- bad input -----------------------------------------------------------------------------------------------------

REFUSED = [
    (("--weight-bits", 1), "is impossible with lsq: at 1 bit its highest level is 0; give 2 to 8"),
    (("--weight-bits", 8, "--method", "dorefa"), "have no zero, and at 8 bits they do not fit int8; give 1 to 7"),
    (("--weight-bits", 8, "--method", "pact"), "at 8 bits they do not fit int8"),
    (("--weight-bits", 8, "--method", "ewgs"), "at 8 bits they do not fit int8"),
    (("--weight-bits", 9), "--weight-bits 9 is impossible"),
    (("--act-bits", 0), "--act-bits 0 is impossible"),
    (("--act-bits", "two"), "--act-bits two is impossible"),
    (("--keep", "classifier=8", "--method", "ewgs"), "--keep classifier=8 is impossible with ewgs"),
    (("--keep", "clasifier=8"), "did you mean 'classifier'"),
    (("--method", "lqs"), "did you mean 'lsq'"),
    (("--activations", "both"), "unknown --activations"),
    (("--bin-reg", 0.1, "--method", "ewgs"), "--bin-reg belongs to --method lsq"),
    (("--delta", "hessian"), "--delta belongs to --method ewgs"),
    (("--delta", "-1", "--method", "ewgs"), "--delta -1 is impossible"),
    (("--reg", "linf"), "--reg linf belongs to --from-scratch"),
    (("--images", 5000), "--images 5000 is more than digits has"),
    (("--calibration", 5000), "is more than digits has"),
    (("-o", "x.onnx"), "must end in .safetensors"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=lambda value: str(value))
def test_what_cannot_be_done_is_one_sentence(
    arguments: tuple[object, ...], message: str, r2: R2, model: Path, tmp_path: Path
) -> None:
    ran = r2("qat", model, *arguments)
    assert ran.code == 2 and message in ran.err.replace("\n", " ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]


@pytest.mark.slow
def test_training_that_diverges_keeps_the_last_good_epoch(model: Path, tmp_path: Path) -> None:
    work, source = work_on(model, "lsq", 2, 2)
    plan, state = finetune.QatPlan(replace(LOOP, epochs=3), 0.02), tmp_path / "state.safetensors"
    kept: list[bytes] = []
    original = prepare.prepare

    def spoil(epoch: Epoch) -> None:
        kept.append(state.read_bytes())
        with torch.no_grad():
            made[0].weights["classifier"].get_parameter("step").fill_(float("nan"))

    def seen(work: QatTask) -> quantizer_placement.Prepared:
        made.append(original(work))
        return made[0]

    made: list[quantizer_placement.Prepared] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "prepare", seen)
        watch = hooks.Progress(lambda steps: None, spoil)
        with pytest.raises(R2Error, match=r"diverged in epoch 2 .*holds the end of epoch 1"):
            finetune.by_training(work, plan, source, hooks.RunControl(state, False, watch))
    assert kept == [state.read_bytes()]
