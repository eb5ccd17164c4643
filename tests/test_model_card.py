"""`--card`: its front matter is YAML that Hugging Face reads, its lines of Python run, and bad places are refused."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import yaml
from PIL import Image

from conftest import R2
from r2cli import data as datasets
from r2cli.cli import model_card
from r2cli.config.groups import ModelWritten
from r2cli.config.inspection import ExportOutput, PalettizeOutput, PtqOutput
from r2cli.deploy import runtime
from r2cli.errors import R2Error
from r2cli.storage.input_spec import TensorSpec, TensorsSpec


def parts(card: str) -> tuple[dict[str, Any], str, str]:
    """The front matter, the page, and its Python."""
    _, front, page = card.split("---\n", 2)
    return yaml.safe_load(front), page, page.split("```python\n")[1].split("```")[0]


@pytest.fixture(scope="module")
def made(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a quantized network and its card."""
    from r2cli.cli.main import invoke

    folder = tmp_path_factory.mktemp("card")
    shutil.copy(trained, folder / "model.safetensors")
    line = [
        "ptq",
        folder / "model.safetensors",
        "--eval-images",
        40,
        "--weight-bits",
        4,
        "--card",
        folder / "README.md",
    ]
    invoke([*map(str, line), "--json"])
    return folder


def test_the_front_matter_is_what_hugging_face_reads(made: Path) -> None:
    from huggingface_hub import ModelCard, ModelCardData

    card = (made / "README.md").read_text()
    front, page, _ = parts(card)
    assert (front["library_name"], front["pipeline_tag"]) == ("onnx", "image-classification")
    data = ModelCard(card).data
    assert isinstance(data, ModelCardData)
    (result,) = data.eval_results or []
    assert (result.task_type, result.dataset_name, result.metric_type) == ("image-classification", "digits", "accuracy")
    assert f"top-1 on 40 samples of digits | {result.metric_value:.2f} % |" in page
    size = (made / "model.w4a8-none.onnx").stat().st_size
    assert f"| bytes | {size:,} |" in page and "every layer runs on integers" in page
    assert f"r2 ptq {made / 'model.safetensors'} --weight-bits 4 --eval-images 40\n" in page


def test_the_lines_of_python_run_and_give_the_same_class(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    _, _, code = parts(Path("README.md").read_text())
    told = runtime.recorded(Path("model.w4a8-none.onnx"))
    test = datasets.load("digits", spec=told.input).test
    images, _ = next(iter(test.batches(8, torch.device("cpu"))))
    wanted = runtime.runner(Path("model.w4a8-none.onnx"))(images).argmax(1)
    assert len(set(wanted.tolist())) > 3
    for image, label in zip(images, wanted.tolist(), strict=True):
        pixels = (image[0] * told.input.std[0] + told.input.mean[0]) * 255
        Image.fromarray(pixels.round().byte().numpy()).save("image.png")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, {})
        assert out.getvalue() == f"[{label}]\n"


def test_a_card_that_is_there_is_kept_and_a_missing_one_is_written_again(made: Path, r2: R2) -> None:
    card, source = made / "README.md", made / "model.safetensors"
    line = ["ptq", source, "--eval-images", 40, "--weight-bits", 4, "--card", card]
    before = card.read_text()
    card.write_text(before + "mine")
    try:
        ran = r2(*line)
        assert ran.code == 2 and "model.w4a8-none.safetensors is there already" in ran.err
        assert r2(*line, "--resume").code == 0 and card.read_text() == before + "mine"
        card.unlink()
        assert r2(*line, "--resume").code == 0 and parts(card.read_text())[0] == parts(before)[0]
    finally:
        card.write_text(before)


@pytest.mark.parametrize(
    ("written", "file", "told"),
    [
        (PtqOutput(card=Path("a.txt")), "m.onnx", "a.txt must end in .md"),
        (PtqOutput(card=Path(".")), "m.onnx", "must end in .md"),
        (ExportOutput(card=Path("there.md")), "m.onnx", "there.md is there already: give --overwrite"),
        (PtqOutput(card=Path("a.md")), "m.tflite", "and none is written"),
        (PalettizeOutput(card=Path("a.md")), None, "and none is written"),
        (PtqOutput(card=Path("/proc/a/b.md")), "m.onnx", "/proc/a/b.md could not be written"),
    ],
)
def test_a_card_that_cannot_be_is_refused_before_the_work(
    written: ModelWritten, file: str | None, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.md").touch()
    with pytest.raises(R2Error, match=told):
        model_card.require(written, Path(file) if file else None)
    assert [path.name for path in tmp_path.iterdir()] == ["there.md"]


def test_names_from_files_stay_texts_and_other_inputs_are_zeros(tmp_path: Path) -> None:
    """A network of two inputs, without a metric, whose names would be YAML, Markdown or an end of the front matter."""
    bad = "a: [b]\n---\n|`x`\x1b[31m\u202e"
    report = {
        "bytes": 10,
        "bits_per_weight": 32.0,
        "float_sqnr_db": 40.0,
        "checks": [{"name": bad, "passed": False}],
        "metric": {"name": bad, "label": bad, "unit": "", "value": 1.5, "shown": bad, "higher": False},
        "measured_on": {"data": bad, "samples": 3},
        "float_operations": [{"kind": "norm", "reason": bad, "node": node} for node in ("n", "m")],
    }
    file = tmp_path / "two.onnx"
    spec = TensorsSpec((TensorSpec("x", (3,)), TensorSpec("ids", (4,), "int64", 9)))
    kinds: dict[str, tuple[int, list[str | int | None]]] = {
        "x": (onnx.TensorProto.FLOAT, ["batch", 3]),
        "ids": (onnx.TensorProto.INT64, [2, 4]),
    }
    inputs = [onnx.helper.make_tensor_value_info(name, *kind) for name, kind in kinds.items()]
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "g", inputs, [onnx.helper.make_tensor_value_info("y", 1, ["batch", 3])])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    told = {"input": spec.described(), "class_names": [], "history": [{"options": {"data": "own.py:data"}}]}
    onnx.helper.set_model_props(model, {f"r2.{key}": json.dumps(value) for key, value in told.items()})
    onnx.save(model, file)
    card = model_card.text(file, report, "r2 export two.safetensors")
    front, page, code = parts(card)
    assert "pipeline_tag" not in front and "quantized" not in front["tags"] and "\x1b" not in card
    (result,) = front["model-index"][0]["results"]
    assert result["task"]["type"] == "other" and result["dataset"]["name"].startswith("a: [b]\n---")
    assert "(n and 1 more)" in page and "failed:" in page and "\n---\n" not in page
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.chdir(tmp_path):
        exec(code, {})
    assert out.getvalue() == "{'y': (1, 3)}\n"
