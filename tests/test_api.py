"""The Python API: the examples of docs/api.md, and the same bytes as the commands."""

import copy
import re
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import r2cli
from conftest import R2
from r2cli import data as datasets
from r2cli.config.option import Config
from r2cli.deploy import parity
from r2cli.errors import InputError
from r2cli.train import evaluation
from r2cli.train.reporter import ProgressBar

DOCUMENT = Path(__file__).parent.parent / "docs" / "api.md"
CONFIGS = (r2cli.PretrainConfig, r2cli.PtqConfig, r2cli.QatConfig, r2cli.PalettizeConfig, r2cli.AnalyzeConfig)


@pytest.mark.slow
def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    examples = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert len(examples) == 6
    names: dict[str, object] = {}
    for example in examples:
        exec(compile(example, str(DOCUMENT), "exec"), names)
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "mobilenet.onnx"}


@pytest.mark.slow
def test_a_function_gives_the_bytes_of_its_command(r2: R2, trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    shutil.copy(trained, path)
    assert r2("ptq", path, "--weight-bits", "3", "--keep", "classifier=8", "--json").code == 0
    config = r2cli.PtqConfig(weight_bits=3, keep={"classifier": 8})
    result = r2cli.quantize(path, None, config)
    written = tmp_path / "model.w3a8-none.safetensors"
    assert result.to_bytes() == written.read_bytes()
    assert r2cli.export(result) == written.with_suffix(".onnx").read_bytes()
    names = [path.name, *(written.with_suffix(end).name for end in (".manifest.json", ".onnx", ".safetensors"))]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


@pytest.mark.slow
def test_palettes_are_those_of_the_command(r2: R2, trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    shutil.copy(trained, path)
    assert r2("palettize", path, "--method", "kmeans", "--bits", "2", "--json").code == 0
    result = r2cli.palettize(path, None, r2cli.PalettizeConfig(method="kmeans", bits=2))
    assert result.to_bytes() == (tmp_path / "model.b2d1-kmeans.safetensors").read_bytes()


class Bars:
    """A reporter that keeps how far each bar came: its name, its total, its steps."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []

    def note(self, text: str, /) -> None:
        pass

    @contextmanager
    def bar(self, what: str, total: int, /) -> Iterator[ProgressBar]:
        steps = Mock()
        yield steps
        self.seen.append((what, total, sum(call.args[0] if call.args else 1 for call in steps.advance.mock_calls)))


def test_a_bar_tells_which_part_runs_and_torch_proves_a_file_on_some_images(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars, path, source = Bars(), tmp_path / "model.onnx", r2cli.load_data("digits", size=8)
    result = r2cli.quantize(trained, source, r2cli.PtqConfig(), reporter=bars)
    r2cli.export(result, path)
    whole = r2cli.verify(path, result, source, timed=False, reporter=bars).measures
    images = len(source.test)
    assert [what for what, *_ in bars.seen] == ["evaluate float", "none", "prove"]
    assert bars.seen[0][1:] == bars.seen[2][1:] == (images, images)
    monkeypatch.setattr(parity, "COMPARED", 1)
    some = r2cli.verify(path, result, source, timed=False).measures
    assert whole["samples"] == images > some["samples"] >= parity.OFF_SAMPLES
    assert some["top1"] == whole["top1"] and some["torch_top1"] is None is not whole["torch_top1"]
    unmeasured = r2cli.verify(path, result, replace(source, task=replace(source.task, metric=None)), timed=False)
    assert unmeasured.passed and unmeasured.measures["samples"] == some["samples"]


def test_nothing_is_printed(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    r2cli.quantize(trained, None, r2cli.PtqConfig())
    r2cli.analyze(trained)
    assert capfd.readouterr() == ("", "")


def test_a_module_stays_as_it_is() -> None:
    source = r2cli.load_data("digits:32", size=8)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    result = r2cli.quantize(network, source, r2cli.PtqConfig())
    assert network.training and all(tensor.equal(before[name]) for name, tensor in network.state_dict().items())
    assert set(result.checkpoint.coded) == {"0.weight", "4.weight"}
    images, _ = next(iter(source.test.batches(8, torch.device("cpu"))))
    assert result.network(images).shape == (8, 10)


def test_a_module_is_trained_quantized_and_palettized() -> None:
    """32 digits and a network of two layers: every training loop runs, and leaves as few values as it was asked for."""
    torch.manual_seed(0)
    source = r2cli.load_data("digits:32", size=8)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    short: dict[str, Any] = {"batch_size": 16, "device": "cpu"}
    trained = r2cli.pretrain(network, source, r2cli.PretrainConfig(reg="linf", epochs=8, **short))
    assert len(trained.epochs) == 8 and trained.epochs[-1].loss < trained.epochs[0].loss
    assert trained.epochs[-1].penalty > 0
    tuned = r2cli.finetune(trained, source, r2cli.QatConfig(weight_bits=2, act_bits=4, epochs=2, **short))
    config = r2cli.PalettizeConfig(bits=2, epochs=2, hard_epochs=1, **short)
    palettes = r2cli.palettize(trained, source, config)
    for result, top1 in ((tuned, tuned.epochs[-1].top1), (palettes, palettes.epochs[-1]["top1"])):
        assert set(result.checkpoint.coded) == {"0.weight", "4.weight"} and len(result.epochs) == 2
        assert all(len(one.codes.unique()) == 4 for one in result.checkpoint.coded.values())
        reached = evaluation.evaluate(result.network, source.test, torch.device("cpu"))
        assert reached == pytest.approx(top1, abs=10)  # three of 32: int32 biases, 8-bit tables
    losses = [epoch.loss for epoch in tuned.epochs]
    assert losses[1] < losses[0]


class Masked(nn.Module):
    """`.float()` and `.to()` of a buffer, and a mask of minus infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("held", torch.arange(8) % 3 > 0)
        self.held: Tensor
        self.mask: Tensor
        self.register_buffer("mask", torch.full((8, 8), float("-inf")).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        x = (self.layer(x.float()) + 1) * self.held.to(torch.float32) * (self.held + 2)  # a constant that is a sum too
        return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=self.mask).flatten(1)


def test_values_that_are_named_as_a_method_of_a_module(tmp_path: Path) -> None:
    x = torch.randint(255, (64, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = r2cli.load_data(([(x[:32], None)], [(x[32:], None)]))
    found = r2cli.quantize(Masked(), data)
    r2cli.export(found, tmp_path / "out.onnx")
    assert r2cli.verify(tmp_path / "out.onnx", found, data).passed
    (tmp_path / "out.safetensors").write_bytes(found.to_bytes())
    assert r2cli.verify(tmp_path / "out.onnx", found.checkpoint, data).passed
    with pytest.raises(InputError, match="data of your own"):
        r2cli.verify(tmp_path / "out.onnx", found)


def test_values_keep_the_names_of_their_layers() -> None:
    """Checkpoints know grids by them. No module has 'steps' for itself, though networks of .onnx files do."""
    network = nn.Sequential(OrderedDict(first=nn.Linear(7, 4), steps=nn.ReLU(), last=nn.Linear(4, 3)))
    x = torch.randn(64, 7)
    found = r2cli.quantize(network, r2cli.load_data(([(x[:32], None)], [(x[32:], None)])))
    assert "steps" in found.checkpoint.activations


def test_weights_that_a_hook_computes_are_those_of_the_network() -> None:
    layer = nn.Linear(7, 4)
    prune.l1_unstructured(layer, "weight", 0.5)
    x = torch.randn(64, 7)
    found = r2cli.quantize(nn.Sequential(layer), r2cli.load_data(([(x[:32], None)], [(x[32:], None)])))
    (coded,) = found.checkpoint.coded.values()
    assert torch.equal(coded.decode() == 0, layer.weight == 0) and layer.weight.grad_fn is not None


def test_a_module_with_weights_that_are_no_numbers_is_refused() -> None:
    layer = nn.Linear(64, 10)
    layer.weight.data[0, 0] = float("nan")
    network = nn.Sequential(nn.Flatten(), layer)
    with pytest.raises(InputError, match="tensor '1.weight' has 1 NaN or infinite values of 640"):
        r2cli.quantize(network, r2cli.load_data("digits", size=8))


def test_a_file_is_not_trained(trained: Path) -> None:
    with pytest.raises(InputError, match=r"takes a torch module or the name of a network, not .*model.safetensors"):
        r2cli.pretrain(trained)  # type: ignore[arg-type]


def test_a_module_needs_data() -> None:
    with pytest.raises(InputError, match="needs the data"):
        r2cli.quantize(nn.Linear(2, 2))
    with pytest.raises(InputError, match="does not say how it is fed"):
        r2cli.export(nn.Linear(2, 2))


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_every_bound_and_check_holds_for_the_api_too(kind: type[Config]) -> None:
    for own in fields(kind):
        option = own.metadata["option"]
        if option.least is not None:
            with pytest.raises(InputError, match="impossible"):
                kind(**{own.name: option.least - 1})
        if option.most is not None:
            with pytest.raises(InputError, match="impossible"):
                kind(**{own.name: option.most + 1})
        if option.check is not None and option.given is None and isinstance(own.default, str):
            with pytest.raises(InputError):
                kind(**{own.name: "nonsense"})


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(InputError, match="exclude each other"):
        r2cli.PtqConfig(weight_bits=3, target_bits=2.5)
    with pytest.raises(InputError, match="--from-scratch"):
        r2cli.QatConfig(reg="margin")
    with pytest.raises(InputError, match="--lut-bits"):
        r2cli.PalettizeConfig(act_bits=8, lut_bits=32)


def test_data_that_the_checkpoint_does_not_name(trained: Path) -> None:
    source = datasets.load("fake:1x8x8:3")
    with pytest.raises(InputError, match="class"):
        r2cli.quantize(trained, source)


def test_an_operator_that_no_file_holds_is_named_before_the_work() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.head(x.flatten(1))
            return torch.inner(x, self.head.weight[:, :10])

    with pytest.raises(InputError, match=r"'inner' \(inner\) cannot be written as ONNX: r2 knows no form of it"):
        r2cli.quantize(Inner(), r2cli.load_data("digits:64", size=8), r2cli.PtqConfig(device="cpu"))


def test_the_seed_rules_the_training_of_a_module_and_the_weights_of_a_new_network() -> None:
    source = r2cli.load_data("digits:32", size=8)
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))
    short: dict[str, Any] = {"epochs": 1, "batch_size": 16, "device": "cpu"}

    def trained(seed: int) -> torch.Tensor:
        torch.rand(seed)  # what others drew before
        made = r2cli.pretrain(copy.deepcopy(network), source, r2cli.PretrainConfig(seed=3, **short))
        return made.checkpoint.floats["2.weight"]

    def new(seed: int) -> torch.Tensor:
        torch.rand(seed)
        module = r2cli.prepare(spec, source, r2cli.QatConfig(seed=3, from_scratch=True, **short))
        return next(weight for name, weight in module.net.named_parameters() if weight.ndim == 4)

    spec = r2cli.pretrain("mobilenet_v1", source, r2cli.PretrainConfig(**short))
    assert trained(5).equal(trained(7)) and new(5).equal(new(7))


@pytest.mark.parametrize(
    "given", [{"distill": 0.5}, {"progressive": True}, {"dampen": 0.1}, {"ema": 0.99}], ids=lambda one: next(iter(one))
)
def test_what_only_our_loop_does_is_refused_for_a_loop_of_one_s_own(trained: Path, given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(given))} is done by finetune"):
        r2cli.prepare(trained, None, r2cli.QatConfig(**given))


def test_options_that_a_method_has_not_are_refused(trained: Path) -> None:
    for config, given, told in (
        (r2cli.PalettizeConfig, {"method": "shared", "iterations": 7}, "--iterations belongs to --method dkm"),
        (r2cli.PalettizeConfig, {"method": "kmeans", "iterations": 7}, "--iterations belongs to --method dkm"),
        (r2cli.PretrainConfig, {"reg": "linf", "margin_k": 4}, "--margin-k belongs to --reg margin"),
        (r2cli.PtqConfig, {"method": "none", "relu6": "relu"}, "--relu6 is for equalization"),
    ):
        with pytest.raises(InputError, match=told):
            config(**given)
    with pytest.raises(InputError, match="--act-range mse looks at images"):
        r2cli.quantize(trained, None, r2cli.PtqConfig(method="dfq", act_range="mse"))


@pytest.mark.parametrize(
    ("config", "given", "told"),
    [
        (r2cli.PtqConfig, {"weight_bits": 4.5}, "--weight-bits 4.5 is impossible: give a whole number"),
        (r2cli.PtqConfig, {"weight_bits": "4"}, "--weight-bits '4' is impossible: give a whole number"),
        (r2cli.PtqConfig, {"weight_bits": True}, "--weight-bits True is impossible: give a whole number"),
        (r2cli.PalettizeConfig, {"bits": 2.5}, "--bits 2.5 is impossible: give a whole number"),
        (r2cli.PretrainConfig, {"lr": "fast"}, "--lr 'fast' is impossible: give a number"),
    ],
)
def test_numbers_of_another_kind_are_refused(config: Any, given: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        config(**given)


def test_numbers_of_numpy_are_numbers() -> None:
    assert r2cli.PtqConfig(weight_bits=np.int64(4)).weight_bits == 4  # type: ignore[arg-type]
    assert r2cli.PretrainConfig(lr=np.float32(0.5)).lr == 0.5  # type: ignore[arg-type]
    with pytest.raises(InputError, match="--lr nan is impossible"):
        r2cli.PretrainConfig(lr=np.float32("nan"))  # type: ignore[arg-type]


def test_one_word_is_one_exception(trained: Path) -> None:
    assert r2cli.PtqConfig(keep="classifier=4").keep == "classifier=4"
    result = r2cli.quantize(trained, None, r2cli.PtqConfig(keep="classifier=4"))
    assert result.checkpoint.coded["classifier.weight"].codec.bits == 4


def test_what_is_no_network_and_no_data_is_told(trained: Path, tmp_path: Path) -> None:
    network, images = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), torch.zeros(2, 1, 8, 8)
    wrong: list[tuple[Any, Any, str]] = [
        (type(network), "digits", "Sequential is a class"),
        (5, "digits", "5 is no network: give a torch module"),
        (network, images, "data is a Tensor: give a name, or what r2cli.load_data makes of it"),
        (network, [(images, None)], "data is a list"),
    ]
    for given, source, told in wrong:
        with pytest.raises(InputError, match=told):
            r2cli.quantize(given, source)
    with pytest.raises(InputError, match="a strength of -1 is impossible"):
        r2cli.regularizer(network, "margin", -1)
    result = r2cli.quantize(trained)
    for path in (tmp_path / "net.tflite", tmp_path):
        with pytest.raises(InputError, match="is no name for a file of target .*: give one that ends in .onnx"):
            r2cli.export(result, path)
