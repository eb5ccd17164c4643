"""Networks of several inputs and outputs, of any shape and kind, from data to the proved file."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import r2cli
from r2cli.calibration import deployed
from r2cli.data import Data, own, own_splits
from r2cli.deploy import runtime
from r2cli.errors import InputError, R2Error
from r2cli.models import signature
from r2cli.storage import checkpoint
from r2cli.storage.input_spec import Given, TensorSpec, TensorsSpec, places

COUNT = 24


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Mixed(nn.Module):
    """An image, a vector, ids and a mask in; a map, a vector and decisions out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.dense, self.table, self.head = nn.Linear(5, 8), nn.Embedding(7, 8), nn.Linear(8, 3)

    def forward(self, image: Tensor, vector: Tensor, ids: Tensor, *, mask: Tensor) -> dict[str, Any]:
        x = torch.relu(self.conv(image))
        words = (self.table(ids) * mask.unsqueeze(-1)).sum(1)
        both = torch.relu(self.dense(vector)) + x.mean((2, 3)) + words
        return {"map": self.up(x), "aux": {"scores": self.head(both)}, "nothing": None}


def mixed() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "image": normal(COUNT, 3, 8, 8),
        "vector": normal(COUNT, 5, seed=1),
        "ids": torch.randint(7, (COUNT, 4), generator=generator),
        "mask": torch.rand(COUNT, 4, generator=generator) < 0.8,
    }


@dataclasses.dataclass
class Two:
    first: Tensor
    second: Tensor | None = None


class Gives(nn.Module):
    def __init__(self, give: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.give = nn.Linear(4, 3), give

    def forward(self, x: Tensor) -> Any:
        return self.give(self.layer(x))


class Step(nn.Module):
    """A recurrent step: its state is an input and an output."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(9, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.tanh(self.mix(torch.cat([x, state], 1)))
        return self.head(state), state


def data(inputs: Any, target: Any = None) -> Data:
    half = [(inputs, target)]
    return own.to_data("own.py:data", (half, half))


def proved(network: nn.Module, given: Data, folder: Path, **options: Any) -> tuple[Any, Any, Path]:
    made = r2cli.quantize(network, given, r2cli.PtqConfig(**options))
    path = folder / "model.onnx"
    r2cli.export(made, path)
    return made, r2cli.verify(path, made, given), path


@pytest.mark.parametrize("method", ["none", "brecq"])
def test_inputs_of_any_kind_by_name_and_outputs_in_dicts(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, inputs = Mixed().eval(), mixed()
    made, proof, path = proved(network, data(inputs), tmp_path, method=method)
    assert proof.passed, [check for check in proof.checks if not check.passed]
    assert made.checkpoint.outputs == ("map", "aux_scores") == tuple(proof.measures["outputs"])
    assert {"conv.weight", "up.weight", "dense.weight", "head.weight"} == set(made.checkpoint.coded)
    session = runtime.session(path)
    assert [(one.name, one.type, one.shape) for one in session.get_inputs()] == [
        ("image", "tensor(float)", ["batch", 3, 8, 8]),
        ("vector", "tensor(float)", ["batch", 5]),
        ("ids", "tensor(int64)", ["batch", 4]),
        ("mask", "tensor(bool)", ["batch", 4]),
    ]
    assert [(one.name, one.shape) for one in session.get_outputs()] == [
        ("map", ["batch", 4, 8, 8]),
        ("aux_scores", ["batch", 3]),
    ]
    found = session.run(None, {name: one.numpy() for name, one in inputs.items()})
    expected = network(**inputs)
    for one, other in zip(found, (expected["map"], expected["aux"]["scores"]), strict=True):
        assert (torch.from_numpy(one) - other).norm() < 0.02 * other.norm()
    assert isinstance(network, Mixed) and type(network) is Mixed, "the user's module is as it was"


def test_a_checkpoint_keeps_inputs_and_outputs(tmp_path: Path) -> None:
    made = r2cli.quantize(Step().eval(), data((normal(COUNT, 4), normal(COUNT, 5))), r2cli.PtqConfig())
    assert made.checkpoint.input == TensorsSpec((TensorSpec("x", (4,)), TensorSpec("state", (5,))))
    assert made.checkpoint.outputs == ("output_0", "output_1")
    again = tmp_path / "again.safetensors"
    again.write_bytes(made.to_bytes())
    read = checkpoint.load(again)
    assert (read.input, read.outputs) == (made.checkpoint.input, made.checkpoint.outputs)
    with pytest.raises(InputError, match="is your own code and runs only when you name it"):
        deployed.network(read)


def test_a_state_that_goes_in_and_comes_out(tmp_path: Path) -> None:
    torch.manual_seed(1)
    _, proof, path = proved(Step().eval(), data((normal(COUNT, 4), normal(COUNT, 5))), tmp_path)
    assert proof.passed and [one.name for one in onnx.load(path).graph.output] == ["output_0", "output_1"]
    assert min(one["sqnr_db"] for one in proof.measures["outputs"].values()) > 30


OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], tuple[str, ...]]] = {
    "a dataclass": (lambda x: Two(x), ("first",)),
    "a list": (lambda x: [x, x + 1], ("output_0", "output_1")),
    "the same twice": (lambda x: (x, x), ("output_0", "output_1")),
    "nested": (lambda x: {"a": [x, (x, 2 * x)]}, ("a_0", "a_1_0", "a_1_1")),
    "classes": (lambda x: x.argmax(1), ("output",)),
    "joined to nothing": (lambda x: torch.cat([x.new_zeros(0), x], 1), ("output",)),  # as transformers' caches begin
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_are_flattened_and_named(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    give, names = OUTPUTS[kind]
    _, proof, path = proved(Gives(give).eval(), data(normal(COUNT, 4)), tmp_path)
    assert proof.passed, [check for check in proof.checks if not check.passed]
    assert tuple(one.name for one in onnx.load(path).graph.output) == names


def test_a_network_is_trained_on_its_own_inputs(tmp_path: Path) -> None:
    torch.manual_seed(3)
    labels = normal(COUNT, 4).argmax(1) % 3
    source = own.to_data("own.py:data", TensorDataset(normal(COUNT, 4), labels))
    assert (source.label_count, len(source.train), len(source.test)) == (3, 20, 4)
    config = r2cli.QatConfig(epochs=2, batch_size=8, weight_bits=4, act_bits="8")
    made = r2cli.finetune(Gives(lambda x: x).eval(), source, config)
    path = tmp_path / "model.onnx"
    r2cli.export(made, path)
    proof = r2cli.verify(path, made, source)
    assert proof.passed and proof.measures["top1"] is not None
    assert r2cli.palettize(Gives(lambda x: x), source, r2cli.PalettizeConfig(bits=2, epochs=2, hard_epochs=1)).layers


# --- data ------------------------------------------------------------------------------------------------------------


def samples(source: Data) -> list[tuple[Given, Any]]:
    return list(source.train.batches(4, torch.device("cpu")))


def test_what_a_factory_may_return() -> None:
    x, y = normal(10, 3), torch.arange(10) % 4
    loader = DataLoader(TensorDataset(x, y), batch_size=3)
    for given in (TensorDataset(x, y), loader, [(x, y)], iter([(x[:5], y[:5]), (x[5:], y[5:])])):
        source = own.to_data("f", given)
        assert (len(source.train), len(source.test), source.label_count) == (8, 2, 4)
        assert source.input == TensorsSpec((TensorSpec("", (3,)),)) and source.task.decides
        rows = torch.cat([places(inputs)[0] for inputs, _ in samples(source)])
        assert {tuple(row) for row in rows.tolist()} < {tuple(row) for row in x.tolist()}
    halves = own.to_data("f", [loader, DataLoader(TensorDataset(x[:4], y[:4]))])  # as a tuple of two
    assert (len(halves.train), len(halves.test)) == (len(x), 4)
    both = own.to_data("f", {"train": [(x, None)], "test": [x[:3].numpy()]})
    assert (len(both.train), len(both.test), both.measured) == (10, 3, False)
    boxes = own.to_data("f", [({"image": x, "target": [{"box": row} for row in x]})])
    assert isinstance(samples(boxes)[0][1], list) and len(samples(boxes)[0][1]) == 4
    shuffled = list(own.to_data("f", [(x, y)]).train.batches(8, torch.device("cpu"), torch.Generator().manual_seed(0)))
    rows, labels = places(shuffled[0][0])[0], shuffled[0][1]
    assert all(int(label) == int(y[(x == row).all(1)][0]) for row, label in zip(rows, labels, strict=True))


BAD: dict[str, tuple[Any, str]] = {
    "a number": (3, "f returned a int: it must return a dataset, a loader or an iterable"),
    "a tensor": (normal(4, 3), "f returned a Tensor: "),
    "no batches": ([], r"f \(train\) is empty"),
    "three parts": ([(normal(4, 3), normal(4, 3), normal(4))], r"gives a tuple of 3 for a batch: a batch is "),
    "text": ([("words", None)], r"gives a str for an input: inputs are tensors"),
    "complex": ([normal(4, 3).to(torch.complex64)], "gives a tensor of torch.complex64 for an input"),
    "lengths": ([((normal(4, 3), normal(5, 3)), None)], r"different lengths \(0 \(4, 3\), 1 \(5, 3\)\)"),
    "other batches": ([normal(4, 3), normal(4, 2)], r"a batch holds input float32 nx2 and the first one .* nx3"),
    "raises": ((1 / 0 for _ in range(1)), r"f \(train\) raised ZeroDivisionError as it was read"),
    "halves": (([normal(4, 3)], [normal(4, 2)]), "its test half holds input float32 nx2 and its train half "),
    "sizes to test": (
        ([normal(4, 1, 3)], [normal(4, 1, 3), normal(1, 1, 2)]),
        "its test half holds .* nx1x3 and .* nx1x2",
    ),
    "one with a target": ([(normal(1, 3), normal(1))], "has one sample: give two at least"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_data_is_refused_with_what_was_expected(kind: str) -> None:
    given, why = BAD[kind]
    with pytest.raises(InputError, match=why):
        own.to_data("f", given)


SIZES = ((8, 8), (8, 12), (8, 8), (16, 8), (8, 8), (8, 8), (8, 12))


def pictures(sizes: Sequence[tuple[int, int]] = SIZES) -> list[Tensor]:
    return [normal(1, 1, *size, seed=seed) for seed, size in enumerate(sizes)]


class Listed(Dataset[Tensor]):
    def __init__(self, given: Sequence[Tensor]) -> None:
        self.given = given

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, row: int) -> Tensor:
        return self.given[row][0]


@pytest.mark.parametrize("form", ["batches", "dataset", "loader that pads"])
def test_samples_of_several_sizes_come_in_batches_of_one(form: str) -> None:
    def padded(samples: Sequence[Tensor]) -> Tensor:
        width = max(one.shape[2] for one in samples)
        return torch.stack([torch.nn.functional.pad(one, (0, width - one.shape[2])) for one in samples])

    given = pictures([size for size in SIZES if size[0] == 8] if "pads" in form else SIZES)
    made = {
        "batches": given,
        "dataset": Listed(given),
        "loader that pads": DataLoader(Listed(given), 4, collate_fn=padded),
    }
    source = own.to_data("f", made[form])
    assert source.input == TensorsSpec((TensorSpec("", (1, 8, 8)),)) and len(source.test) == 1
    found = [places(inputs)[0] for inputs, _ in source.train.batches(16, torch.device("cpu"))]
    assert {(3, 1, 8, 8), (2, 1, 8, 12)} <= {tuple(one.shape) for one in found}
    held_out = next(iter(source.test.batches(1, torch.device("cpu"))))[0]
    ones = sorted(float(row.sum()) for one in (*found, held_out) for row in one)
    assert ones == pytest.approx(sorted(float(one.sum()) for one in given), abs=1e-5)


def test_one_input_without_a_target_is_enough() -> None:
    source = own.to_data("f", [normal(1, 4)])
    assert (len(source.train), len(source.test)) == (1, 1)


class Upsampled(nn.Module):
    """It takes pictures of any size; with `flat`, of one size only."""

    def __init__(self, *, flat: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 2, 1), nn.Linear(128, 2)
        self.flat = flat

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.interpolate(torch.relu(self.first(x)), scale_factor=2.0)
        x = self.second(x)
        return self.head(x.flatten(1)) if self.flat else x


class Twice(nn.Module):
    """One layer over tokens that runs for two texts: several nodes each time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x[:, 0]) * self.layer(x[:, 1])).sum(2)


def test_a_layer_that_runs_twice_names_its_nodes_apart(tmp_path: Path) -> None:
    _, proof, path = proved(Twice().eval(), data(normal(COUNT, 2, 5, 4)), tmp_path)
    outputs = [name for node in onnx.load(path).graph.node for name in node.output]
    assert proof.passed and len(set(outputs)) == len(outputs)


def test_inputs_of_other_sizes_calibrate_a_network_that_takes_any(tmp_path: Path) -> None:
    torch.manual_seed(6)
    large = pictures()
    large[1] = 50 * large[1]
    source = own.to_data("f", (large, [normal(4, 1, 8, 8)]))
    made, proof, path = proved(Upsampled().eval(), source, tmp_path)
    assert proof.passed and onnx.load(path).graph.input[0].type.tensor_type.shape.dim[3].dim_value == 8
    (grid,) = (grid for name, grid in made.checkpoint.activations.items() if name == "x" or name == "input")
    assert float(grid.scale) * 255 == pytest.approx(float(large[1].max() - large[1].min()), rel=1e-2)
    with pytest.raises(InputError, match="was read for .*nx1x8x8, and is another network for .*nx1x8x12: calibrate on"):
        r2cli.quantize(Upsampled(flat=True).eval(), source)
    with pytest.raises(InputError, match="wants all calibration inputs at once, and they are 1x8x8 and 1x"):
        r2cli.quantize(Upsampled().eval(), source, r2cli.PtqConfig(method="brecq"))
    with pytest.raises(InputError, match="f has inputs of several sizes, which calibrate: train on one size"):
        r2cli.finetune(Upsampled().eval(), source, r2cli.QatConfig(epochs=1, batch_size=4))


def test_batches_that_do_not_fit_the_network_are_named_on_both_sides() -> None:
    made = r2cli.quantize(Step().eval(), data((normal(4, 4), normal(4, 5))), r2cli.PtqConfig(calibration=4)).checkpoint
    for other in (data((normal(4, 4), normal(4, 6))), data({"x": normal(4, 4), "memory": normal(4, 5)})):
        with pytest.raises(InputError, match="own.py:data holds .* takes x float32 nx4, state float32 nx5"):
            r2cli.quantize(made, other)
    with pytest.raises(InputError, match="the batches hold a, b and .*Step takes x, state: give each input the name"):
        r2cli.quantize(Step(), data({"a": normal(4, 4), "b": normal(4, 5)}))
    taken_for_a_target = own.to_data("own.py:data", [(normal(4, 4), normal(4, 5))])
    for other in (data(normal(4, 4)), taken_for_a_target):
        with pytest.raises(
            InputError, match=r"Step reads 2 inputs \(x, state\) and the data gives input float32 nx4: a "
        ):
            r2cli.quantize(Step(), other)
    with pytest.raises(
        InputError, match=r": a batch is \(inputs, target\), so give \(\(x, state\), target\), or the data"
    ):
        r2cli.quantize(Step(), taken_for_a_target)
    with pytest.raises(InputError, match=r"Step cannot take x float32 nx4, state float32 nx3 \("):
        r2cli.quantize(Step(), data((normal(4, 4), normal(4, 3))))


def test_a_network_is_called_by_place_whatever_its_arguments_are() -> None:
    network = signature.by_place(Mixed().eval(), ("image", "vector", "ids", "mask"))
    inputs = mixed()
    outputs = network(*inputs.values())
    assert [tuple(one.shape) for one in outputs] == [(COUNT, 4, 8, 8), (COUNT, 3)]
    assert signature.by_place(network, ("other",)) is network and sorted(network.state_dict()) == sorted(
        Mixed().state_dict()
    )


def test_damaged_inputs_and_outputs_in_a_file_are_refused(tmp_path: Path) -> None:
    made = r2cli.quantize(Step().eval(), data((normal(4, 4), normal(4, 5))), r2cli.PtqConfig(calibration=4))
    tensors, metadata = safetensors.torch.load(made.to_bytes()), dict[str, str]()
    with safe_open_bytes(made.to_bytes(), tmp_path) as file:
        metadata = file.metadata()
    entry = json.loads(metadata["r2"])
    state = entry["input"]["tensors"][1]
    changes: dict[str, tuple[Callable[[], object], str]] = {
        "one name": (lambda: state.update(name="x"), "two tensors of one name: x, x"),
        "too large": (lambda: state.update(name="state", shape=[1 << 15, 1 << 15]), "none of ours has"),
        "another kind": (lambda: state.update(shape=[5], kind="float16"), "'input.tensors.1.kind' is 'float16'"),
        "no outputs": (lambda: (state.update(kind="float32"), entry.update(outputs=[])), "'outputs' are none"),
        "one output twice": (lambda: entry.update(outputs=["a", "a"]), "'outputs' are a, a"),
    }
    for change, why in changes.values():
        change()
        path = tmp_path / "damaged.safetensors"
        path.write_bytes(safetensors.torch.save(tensors, {"r2": json.dumps(entry)}))
        with pytest.raises(InputError, match=f"has damaged r2 metadata .*{why}"):
            checkpoint.load(path)


def safe_open_bytes(content: bytes, folder: Path) -> Any:
    (folder / "whole.safetensors").write_bytes(content)
    return safetensors.safe_open(folder / "whole.safetensors", framework="pt")


def test_metric_and_loss_of_data_by_name() -> None:
    x, y = normal(COUNT, 4), normal(COUNT, 3)
    source = r2cli.load_data([(x, y)], metric="mae")
    assert source.measured and not source.task.logits and source.task.loss.name == "l1"
    made = r2cli.quantize(Gives(lambda x: x).eval(), source, r2cli.PtqConfig())
    assert made.before is not None and made.float_top1 is None and str(made.before).startswith("MAE ")
    assert r2cli.load_data("digits:10", loss="distill").task.loss.distils


class Letters(nn.Module):
    """Logits of each position of a text, with the classes second."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 6), nn.Linear(6, 9)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids)).transpose(1, 2)


def test_logits_of_many_places_are_measured_and_compared(tmp_path: Path) -> None:
    torch.manual_seed(4)
    ids = torch.randint(9, (COUNT, 5), generator=torch.Generator().manual_seed(0))
    source = r2cli.load_data([(ids, ids)], metric="top1")
    made, proof, _ = proved(Letters().eval(), source, tmp_path, act_bits="none", method="auto")
    assert proof.passed and proof.measures["agreement"] is None, [one for one in proof.checks if not one.passed]
    assert proof.measures["top1"] == pytest.approx(made.before.value, abs=5)


class Gained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gain = nn.Linear(4, 3), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        return self.layer(x) * gain + self.gain


def test_an_input_with_the_name_of_a_weight_is_named() -> None:
    made = r2cli.quantize(Gained().eval(), data((normal(4, 4), normal(4, 3))), r2cli.PtqConfig(calibration=4))
    with pytest.raises(R2Error, match="'gain' is an input or output and a weight too"):
        r2cli.export(made)


class Ordered(Dataset[tuple[Tensor, int]]):
    """Samples in the order of their ten classes, of which nobody tells in advance; or told as `targets`."""

    def __init__(self, *, told: bool) -> None:
        if told:
            self.targets = [row // 20 for row in range(len(self))]

    def __len__(self) -> int:
        return 200

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        if row >= len(self):
            raise IndexError(row)
        return torch.full((1, 4, 4), float(row)), row // 20


@pytest.mark.parametrize("told", [False, True])
def test_classes_are_counted_over_all_samples(told: bool) -> None:
    whole = Ordered(told=told)
    assert r2cli.load_data(whole).classes == r2cli.load_data((whole, whole)).classes == 10
    assert r2cli.load_data(Subset(whole, range(100))).classes == 5
    split = own.to_data("data", (whole, whole)).train
    assert isinstance(split, own_splits.DatasetSplit)
    labels = split.of(torch.tensor([199, 0])).labels()
    assert labels is not None and labels.tolist() == [9, 0]


def test_targets_that_the_samples_do_not_have_are_not_believed() -> None:
    class Renumbered(Ordered):
        def __getitem__(self, row: int) -> tuple[Tensor, int]:
            image, label = super().__getitem__(row)
            return image, label // 5

    assert r2cli.load_data(Renumbered(told=True)).classes == 2
    assert r2cli.load_data(Subset(Renumbered(told=True), range(100))).classes == 1


def test_samples_are_not_all_read_where_the_classes_have_names() -> None:
    read = []

    class Named(Ordered):
        classes = ("a", "b")

        def __getitem__(self, row: int) -> tuple[Tensor, int]:
            read.append(row)
            return super().__getitem__(row)

    whole = Named(told=False)
    assert r2cli.load_data((whole, whole)).classes == 2 and len(set(read)) < 100


def test_a_label_that_cannot_be_read_is_told() -> None:
    class Broken(Ordered):
        def __getitem__(self, row: int) -> tuple[Tensor, int]:
            if row == 150:
                raise OSError("no such scan")
            return super().__getitem__(row)

    with pytest.raises(InputError, match=r"raised OSError as it was read \(no such scan\)"):
        r2cli.load_data(Broken(told=False))


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("size", "factor"), [(7, 1.5), (7, 2.3), (7, 0.6), (7, (2.0, 1.3)), (30, 2.1), (45, 1.4), (20, 1.15), (10, 0.55)]
)
def test_a_resize_by_a_factor_that_is_no_ratio_of_sizes(
    mode: str, size: int, factor: float | tuple[float, float], tmp_path: Path
) -> None:
    class Resized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(1, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.interpolate(self.layer(x), scale_factor=factor, mode=mode)

    torch.manual_seed(0)
    network, source = Resized().eval(), r2cli.load_data([(normal(8, 1, size, size), None)])
    path = tmp_path / "net.onnx"
    result = r2cli.quantize(network, source, r2cli.PtqConfig(act_bits="none", device="cpu"))
    r2cli.export(result, path)
    proof = r2cli.verify(path, result, source, timed=False)
    assert proof.passed, [check for check in proof.checks if not check.passed]
    if mode == "nearest":
        lite = r2cli.quantize(network, source, r2cli.PtqConfig(target="tflite", device="cpu"))
        r2cli.export(lite, tmp_path / "net.tflite")
        proof = r2cli.verify(tmp_path / "net.tflite", lite, source, timed=False)
        assert proof.passed, [check for check in proof.checks if not check.passed]


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids).mean(1))


def test_an_id_beyond_the_embedding_is_told() -> None:
    source = r2cli.load_data([(torch.full((8, 3), 5), torch.arange(8) % 2)])
    with pytest.raises(InputError, match="beyond the rows of the network's embedding"):
        r2cli.quantize(Words(), source)


class Empty(nn.Module):
    """A value of no numbers, and two layers around it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(torch.cat([torch.sigmoid(y[:, 2:2]), y], 1))


def test_a_value_of_no_numbers_is_named() -> None:
    source = r2cli.load_data([(normal(16, 4), torch.arange(16) % 2)])
    with pytest.raises(R2Error, match="the value '.*' has no numbers, as one of its sizes is 0: give other data"):
        r2cli.quantize(Empty(), source, r2cli.PtqConfig(device="cpu"))


def test_data_without_numbers_is_blamed_on_the_data() -> None:
    images = normal(16, 1, 4, 4)
    images[3, 0, 1, 1] = torch.nan
    source = r2cli.load_data([(images, torch.arange(16) % 2)])
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with pytest.raises(InputError, match="holds NaN or infinite values"):
        r2cli.quantize(network, source, r2cli.PtqConfig(device="cpu"))
    with pytest.raises(InputError, match="holds NaN or infinite values"):
        r2cli.pretrain(network, source, r2cli.PretrainConfig(epochs=1, batch_size=8, device="cpu"))


class Judging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.head(-x if x.mean() > 0 else x)


def test_what_torch_export_prints_of_its_failure_is_not_shown(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="torch.export cannot read Judging"):
        r2cli.quantize(Judging(), r2cli.load_data([(normal(8, 1, 4, 4), torch.arange(8) % 2)]))
    assert capfd.readouterr() == ("", "")
