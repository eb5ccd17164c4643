"""The road of a network for text, on a tiny random MobileBERT and a few rows: from GLUE's file to ONNX Runtime."""

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from conftest import R2
from r2cli import data, models
from r2cli.calibration import deployed
from r2cli.errors import InputError
from r2cli.graph import edit, structure
from r2cli.models import text
from r2cli.storage import checkpoint
from r2cli.storage.checkpoint import ModelSpec

transformers = pytest.importorskip("transformers")

SIZE = 16
NAMES = ("river", "city", "king", "song", "war")
WORDS = [*NAMES, *"what which who is was the a of in long old".split()]


def _rows() -> list[tuple[str, str, str]]:
    """Whether a sentence is about what the question asks for."""
    pairs = [(asked, told) for asked in NAMES for told in NAMES] * 3
    return [(f"which {a} is old?", f"the {b} was long", "entailment" if a == b else "not_entailment") for a, b in pairs]


def _write(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    lines = ["index\tquestion\tsentence\tlabel", *("\t".join((str(i), *row)) for i, row in enumerate(rows))]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def tsv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("data") / "pairs.tsv", _rows())


@pytest.fixture(scope="module")
def mobilebert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as transformers writes it: two layers with bottlenecks, 16 wide, and their tokenizer."""
    where = tmp_path_factory.mktemp("mobilebert")
    torch.manual_seed(0)
    text.write_tiny(where, ["?", *WORDS])
    return where


@pytest.fixture(scope="module")
def made(mobilebert: Path, tsv: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A fine-tuned checkpoint and its report; the encoder's directory is gone by then."""
    from r2cli.cli.main import invoke

    where = tmp_path_factory.mktemp("made")
    encoder = shutil.copytree(mobilebert, where / "encoder")
    options = ["--size", SIZE, "--epochs", 2, "--batch-size", 16, "--reg", "margin", "--reg-weight", 0.1, "--json"]
    path = where / "text.safetensors"
    report = invoke(
        [*map(str, ["pretrain", "--model", f"text:{encoder}", "--data", f"qnli:{tsv}", *options, "-o", path])]
    )
    shutil.rmtree(encoder)
    return path, report


# --- the road --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "options"),
    [("ptq", []), ("ptq", ["--method", "adaround", "--target-bits", "4.5"]), ("palettize", ["--method", "kmeans"])],
    ids=["w8", "w4.5-adaround", "kmeans"],
)
def test_what_layers_read_has_eight_bits(
    r2: R2, made: tuple[Path, Any], tsv: Path, tmp_path: Path, command: str, options: list[str]
) -> None:
    output = tmp_path / "out.safetensors"
    ran = r2(command, made[0], *options, "--data", f"qnli:{tsv}", "-o", output, "--json")
    assert ran.code == 0, ran.err
    report, coded = json.loads(ran.out), checkpoint.load(output)
    kinds = {each["kind"] for each in report["float_operations"]}
    assert (
        report["passed"]
        and {"attention", "embedding", "sum"} <= kinds
        and all(each["reason"] != "r2 knows no integer form of it" for each in report["float_operations"])
    )
    layers = {
        n for n, m in deployed.network(checkpoint.load(made[0])).named_modules() if isinstance(m, torch.nn.Linear)
    }
    assert {name.removesuffix(".weight") for name in coded.coded} == layers
    net = deployed.network(coded)
    assert isinstance(net, torch.fx.GraphModule)
    assert all(edit.source(net, structure.node_of(net, layer)) in coded.activations for layer in structure.layers(net))
    # Values are named by modules: a running number would be another one with the next release of torch.
    assert any("encoder_layer_1_attention" in name for name in coded.activations)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "options", "coded"),
    [
        ("ptq", ["--method", "none", "--weight-bits", "4", "--embeddings"], 1),
        ("palettize", ["--method", "kmeans", "--bits", "2", "--embeddings"], 1),
        ("palettize", ["--method", "dkm", "--bits", "1", "--epochs", "2", "--hard-epochs", "1"], 0),
    ],
    ids=["w4-embeddings", "kmeans-2-embeddings", "dkm-1"],
)
def test_a_checkpoint_becomes_a_proved_file(
    r2: R2, made: tuple[Path, Any], tsv: Path, tmp_path: Path, command: str, options: list[str], coded: int
) -> None:
    output = tmp_path / "out.safetensors"
    where = ["--data", f"qnli:{tsv}", "--act-bits", "none", "-o", output, "--json"]
    ran = r2(command, made[0], *options, *where)
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    weights = sum(t.numel() for n, t in checkpoint.load(made[0]).floats.items() if "embeddings.weight" in n)
    assert report["passed"] and report["embeddings"] == {"coded": coded * weights, "float": (1 - coded) * weights}
    assert ("embeddings.weight" in " ".join(checkpoint.load(output).coded)) == bool(coded)
    file = onnx.load(output.with_suffix(".onnx"))
    kind = file.graph.input[0].type.tensor_type
    assert kind.elem_type == onnx.TensorProto.INT64
    assert [d.dim_value for d in kind.shape.dim[1:]] == [3, SIZE]
    for evaluated in (output, output.with_suffix(".onnx")):
        ran = r2("evaluate", evaluated, "--data", f"qnli:{tsv}", "--json")
        assert ran.code == 0 and json.loads(ran.out)["top1"] == report["top1"], ran.err


@pytest.mark.slow
def test_the_float_network_is_exported_and_analyzed(r2: R2, made: tuple[Path, Any], tsv: Path, tmp_path: Path) -> None:
    output = tmp_path / "float.onnx"
    ran = r2("export", made[0], "--data", f"qnli:{tsv}", "-o", output, "--json")
    assert ran.code == 0 and json.loads(ran.out)["top1"] == made[1]["top1"], ran.err
    ran = r2("analyze", made[0], "--json")
    names = [row["layer"] for row in json.loads(ran.out)["files"][0]["layers"]]
    assert ran.code == 0 and "mobilebert.encoder.layer.1.attention.self.query" in " ".join(names)
    assert "shown as trained only" not in ran.err + ran.out


@pytest.mark.slow
def test_it_trains_with_quantizers(r2: R2, made: tuple[Path, Any], tsv: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    options = ["--epochs", 1, "--batch-size", 32, "-o", output, "--json"]
    ran = r2("qat", made[0], "--data", f"qnli:{tsv}", *options)
    assert ran.code == 0 and json.loads(ran.out)["passed"], ran.err
    coded = checkpoint.load(output)
    assert {one.codec.bits for one in coded.coded.values()} == {4} and coded.activations


@pytest.mark.slow
def test_what_needs_the_graph_is_refused_with_the_way_out(r2: R2, made: tuple[Path, Any], tsv: Path) -> None:
    for command, options, way_out in (
        ("palettize", ["--method", "kmeans", "--embeddings"], "--act-bits none"),
        ("ptq", ["--embeddings"], "--act-bits none"),
    ):
        ran = r2(command, made[0], "--data", f"qnli:{tsv}", *options)
        assert ran.code == 2 and way_out in ran.err and "Traceback" not in ran.err


def test_embeddings_are_asked_of_a_network_that_has_some(r2: R2, trained: Path, tmp_path: Path) -> None:
    options = ["--act-bits", "none", "--embeddings", "-o", tmp_path / "out.safetensors"]
    for command in (["ptq", trained], ["palettize", trained, "--method", "kmeans"]):
        ran = r2(*command, *options)
        assert ran.code == 2 and "has no embeddings" in ran.err


# --- the checkpoint --------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_architecture_and_tokenizer_and_no_path(made: tuple[Path, Any], mobilebert: Path) -> None:
    header = checkpoint.load_tensors(made[0])[1]["r2"]
    assert "pairs.tsv" not in header and "encoder" not in json.loads(header)["history"][0]["options"]["data"]
    assert "/" not in json.dumps(json.loads(header)["model"])
    read = checkpoint.load(made[0])
    assert read.model.name == "text:mobilebert" and read.class_names == ("entailment", "not_entailment")
    own = transformers.AutoModelForSequenceClassification.from_pretrained(mobilebert)
    assert set(own.state_dict()) == set(read.floats)


def test_training_starts_from_the_pretrained_weights(mobilebert: Path) -> None:
    spec = models.spec(f"text:{mobilebert}", classes=2, channels=3, size=SIZE)
    model = models.build(spec)
    text.start(model, f"text:{mobilebert}")
    own = transformers.AutoModelForSequenceClassification.from_pretrained(mobilebert)
    assert all(torch.equal(tensor, own.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_checkpoint_names_no_code(mobilebert: Path) -> None:
    spec = models.spec(f"text:{mobilebert}", classes=2, channels=3, size=SIZE, args={"num_hidden_layers": 1})
    code = {
        "auto_map": {"AutoConfig": "evil.Config"},
        "_attn_implementation": "evil/kernel",
        "attn_implementation": "x",
    }
    for name, value in code.items():
        with pytest.raises(InputError, match=f"keyword '{name}'"):
            models.build(ModelSpec(spec.name, 2, args={**spec.args, name: value}))
    model = models.build(spec)
    assert type(model).__mro__[2] is transformers.MobileBertForSequenceClassification
    assert len(list(model.get_submodule("mobilebert.encoder.layer").children())) == 1
    with pytest.raises(InputError, match="cannot load text:evil"):
        models.build(ModelSpec("text:evil", 2, args={"model_type": "evil"}))


def test_names_and_options_that_cannot_be_had(
    mobilebert: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = f"text:{mobilebert}"
    with pytest.raises(InputError, match="transformers cannot load"):
        models.spec(f"text:{tmp_path / 'nothing'}", classes=2, channels=3, size=SIZE)
    with pytest.raises(InputError, match="at most 128 tokens"):
        models.spec(name, classes=2, channels=3, size=129)
    with pytest.raises(InputError, match="no 'layers' in its configuration"):
        models.spec(name, classes=2, channels=3, size=SIZE, args={"layers": 1})
    with pytest.raises(InputError, match="--stem does not apply"):
        models.spec(name, classes=2, channels=3, size=SIZE, stem="small")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'r2cli\[text\]'"):
        models.spec("mobilebert", classes=2, channels=3, size=SIZE)


# --- data ------------------------------------------------------------------------------------------------------------


def _load(tokens_of: Path, name: str, size: int = SIZE) -> data.Data:
    packed = data.pack_tokenizer(text.tokenizer(f"text:{tokens_of}"))
    return data.load(name, size=size, tokenizer=packed)


def _texts(split: data.Split) -> data.TextSplit:
    assert isinstance(split, data.TextSplit)
    return split


def test_tokens_are_those_of_the_network_s_own_tokenizer(mobilebert: Path, tsv: Path) -> None:
    own = transformers.AutoTokenizer.from_pretrained(mobilebert)
    for size in (SIZE, 8):  # filled up, and cut
        loaded = _load(mobilebert, f"qnli:{tsv}", size)
        assert (len(loaded.train), len(loaded.test)) == (60, 15)
        found = {tuple(row.flatten().tolist()) for split in (loaded.train, loaded.test) for row in _texts(split).tokens}
        questions, sentences, _ = zip(*_rows(), strict=True)
        asked = {"truncation": True, "max_length": size, "padding": "max_length", "return_token_type_ids": True}
        wanted = own(list(questions), list(sentences), **asked)
        keys = ("input_ids", "attention_mask", "token_type_ids")
        assert found == {tuple(sum((wanted[k][i] for k in keys), [])) for i in range(len(questions))}


def test_a_file_is_divided_alike_each_time_and_a_folder_as_it_is(mobilebert: Path, tsv: Path, tmp_path: Path) -> None:
    first, again = (_load(mobilebert, f"qnli:{tsv}") for _ in range(2))
    assert torch.equal(_texts(first.test).tokens, _texts(again.test).tokens)
    rows = _rows()
    _write(tmp_path / "train.tsv", rows[:50])
    _write(tmp_path / "dev.tsv", rows[50:])
    folder = _load(mobilebert, f"qnli:{tmp_path}")
    assert (len(folder.train), len(folder.test)) == (50, 25)
    labels = [folder.class_names.index(label) for *_, label in rows[50:]]
    assert _texts(folder.test).labels.tolist() == labels
    fewer = data.with_fewer(folder, 7, 0)
    assert len(fewer.train) == 7
    tokens, _ = next(iter(fewer.train.batches(7, torch.device("cpu"))))
    assert tokens.shape == (7, 3, SIZE) and tokens.dtype == torch.int64


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("question\tsentence\nwhat\tthe\n", "must name a column label"),
        ("question\tlabel\nwhat\ta\nwhat\tb\tc\n", "line 3 has 3 columns"),
        ("question\tlabel\n", "no rows"),
        ("question\tlabel\n" + "what\ta\n" * 9, "one label, 'a'"),
        ("question\tlabel\nwhat\ta\nwho\tb\n", "too few"),
    ],
)
def test_a_file_of_another_form_is_refused(mobilebert: Path, tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "x.tsv").write_text(content)
    with pytest.raises(InputError, match=told):
        _load(mobilebert, f"qnli:{tmp_path / 'x.tsv'}")


def test_text_and_images_are_not_taken_for_each_other(mobilebert: Path, tsv: Path, made: tuple[Path, Any]) -> None:
    with pytest.raises(InputError, match="give --model text:DIR"):
        data.load(f"qnli:{tsv}")
    with pytest.raises(InputError, match="digits holds images and the network reads text"):
        _load(mobilebert, "digits")
    with pytest.raises(InputError, match="digits holds images and the network reads text"):
        data.load("digits", spec=checkpoint.load(made[0]).input)
    with pytest.raises(InputError, match="the network reads images"):
        data.load(f"qnli:{tsv}", spec=data.load("digits").input)


def test_logits_do_not_depend_on_what_padding_hides(made: tuple[Path, Any]) -> None:
    """A text's logits are those of the same text in a longer tensor of padding."""
    read = checkpoint.load(made[0])
    model = deployed.network(read)
    tokens = read.input.blank(1)
    assert isinstance(tokens, Tensor)
    tokens[:, 0, :6] = torch.tensor([2, 6, 7, 3, 8, 3])
    tokens[:, 1, 6:] = 0
    with torch.inference_mode():
        other = tokens.clone()
        other[:, 0, 6:] = 9
        torch.testing.assert_close(model(tokens), model(other), rtol=1e-5, atol=1e-6)
