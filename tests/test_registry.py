"""A method is one entry: toys of docs/methods.md run from the command line, and nothing else names a method."""

import ast
import importlib.metadata
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import r2cli
from conftest import R2
from r2cli import registry
from r2cli.config.methods import PalettizeConfig
from r2cli.config.training import QatConfig
from r2cli.errors import InputError

PACKAGE = Path(r2cli.__file__).parent
DOC = Path(__file__).parent.parent / "docs" / "methods.md"
SMALL = ("--device", "cpu", "--json")


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two modules that docs/methods.md prints, on the path as they would be installed."""
    methods, entries, *_ = re.findall(r"^```python\n(.*?)^```", DOC.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "toys.py").write_text(methods)
    (tmp_path / "toy_entries.py").write_text(entries)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model(trained: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "model.safetensors"
    copy.write_bytes(trained.read_bytes())
    return copy


# --- one entry is enough -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_regularizer_is_one_entry(toys: None, r2: R2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import toy_entries  # type: ignore[import-not-found]

    monkeypatch.setitem(registry.REGULARIZERS, "toy", toy_entries.REGULARIZER)
    made = tmp_path / "own.safetensors"
    ran = r2("pretrain", "--model", "resnet8", "--size", "8", "--epochs", "1", "--reg", "toy", "-o", made, *SMALL)
    assert ran.code == 0 and '"penalty"' in ran.out, ran.err
    ran = r2("ptq", made, *SMALL)
    assert ran.code == 0 and (tmp_path / "own.w8a8-none.onnx").exists(), ran.err


@pytest.mark.slow
def test_a_method_of_post_training_quantization_is_one_entry(
    toys: None, r2: R2, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import toy_entries

    monkeypatch.setitem(registry.PTQ_METHODS, "toy", toy_entries.PTQ)
    ran = r2("ptq", model, "--method", "toy", "--calibration", 64, *SMALL)
    assert ran.code == 0 and model.with_name("model.w8a8-toy.onnx").exists(), ran.err
    ran = r2("ptq", model, "--method", "toy", "--calibration", 0, *SMALL, "--overwrite")
    assert ran.code == 2 and "--method toy needs data" in ran.err.replace("\n", " ")


@pytest.mark.slow
def test_a_method_of_training_with_quantizers_is_one_entry(
    toys: None, r2: R2, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import toy_entries

    monkeypatch.setitem(registry.QAT_METHODS, "toy", toy_entries.QAT)
    ran = r2("qat", model, "--method", "toy", "--epochs", 1, "--calibration", 64, *SMALL)
    assert ran.code == 0 and model.with_name("model.w4a8-toy.onnx").exists(), ran.err
    assert '"lr": 0.02' in ran.out
    ran = r2("qat", model, "--method", "toy", "--weight-bits", 1, *SMALL)
    assert ran.code == 2 and "--weight-bits 1 is impossible with toy; give 2 to 8" in ran.err.replace("\n", " ")


@pytest.mark.slow
def test_a_learner_of_palettes_is_one_entry(toys: None, r2: R2, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import toy_entries

    monkeypatch.setitem(registry.PALETTE_METHODS, "toy", toy_entries.PALETTE)
    ran = r2("palettize", model, "--method", "toy", "--epochs", 1, "--calibration", 64, *SMALL)
    assert ran.code == 0 and model.with_name("model.b4d1-toy.onnx").exists(), ran.err


# --- entry points --------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Entry points as a test wants them, by name; what they add is gone after it."""
    points: dict[str, str] = {}

    def entry_points(*, group: str) -> list[importlib.metadata.EntryPoint]:
        return [importlib.metadata.EntryPoint(name, value, group) for name, value in points.items()]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    kinds: tuple[dict[str, Any], ...] = (
        registry.REGULARIZERS,
        registry.PTQ_METHODS,
        registry.QAT_METHODS,
        registry.PALETTE_METHODS,
    )
    before = [dict(kind) for kind in kinds]
    registry.read_entry_points.cache_clear()
    yield points
    for kind, was in zip(kinds, before, strict=True):
        kind.clear()
        kind.update(was)
    registry.read_entry_points.cache_clear()


def test_a_package_outside_adds_a_method(toys: None, installed: dict[str, str], r2: R2, model: Path) -> None:
    installed["qat:toy"] = "toy_entries:QAT"
    assert "toy" not in registry.QAT_METHODS
    ran = r2("qat", model, "--method", "tog", *SMALL)
    assert ran.code == 2 and "did you mean 'toy'" in ran.err.replace("\n", " ")
    ran = r2("qat", model, "--method", "toy", "--dry-run", *SMALL)
    assert ran.code == 0 and registry.names(registry.QAT_METHODS)[-1] == "toy", ran.err


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("qat:toy", "toy_entries:NOTHING", "cannot be loaded from toy_entries:NOTHING"),
        ("qat:toy", "no_such_module:ENTRY", "cannot be loaded from no_such_module:ENTRY"),
        ("qat:toy", "toy_entries:PTQ", "is a PtqEntry and no QatEntry"),
        ("qat:lsq", "toy_entries:QAT", "has a name that is taken"),
        ("toy", "toy_entries:QAT", "is no KIND:NAME"),
    ],
)
def test_an_entry_point_that_is_none_is_named(
    name: str, value: str, message: str, toys: None, installed: dict[str, str]
) -> None:
    installed[name] = value
    with pytest.raises(InputError, match=re.escape(message)):
        registry.get(registry.QAT_METHODS, "toy")


def test_known_names_need_no_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.read_entry_points.cache_clear()
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: pytest.fail("read for a name that is known"))
    for kind in (registry.REGULARIZERS, registry.PTQ_METHODS, registry.QAT_METHODS, registry.PALETTE_METHODS):
        for name in kind:
            registry.one_of(kind)(name)
            assert registry.load(kind, name) is not None


# --- what an entry says --------------------------------------------------------------------------------------------


def test_an_entry_that_does_not_fit_its_method_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from r2cli.ptq import ptq_method

    monkeypatch.setitem(registry.PTQ_METHODS, "toy", registry.PtqEntry("r2cli.ptq.brecq:METHOD", "a toy"))
    with pytest.raises(InputError, match="must say looks=True"):
        ptq_method.method("toy")
    silent = registry.PtqEntry("r2cli.ptq.brecq:METHOD", "a toy", looks=True)
    monkeypatch.setitem(registry.PTQ_METHODS, "toy", silent)
    with pytest.raises(InputError, match="must say learns=True"):
        ptq_method.method("toy")
    monkeypatch.setitem(registry.PTQ_METHODS, "toy", registry.PtqEntry("r2cli.qat.lsq:METHOD", "a toy"))
    with pytest.raises(InputError, match="is a QatMethod and no PtqMethod"):
        ptq_method.method("toy")


def test_options_of_one_method_are_refused_for_another() -> None:
    with pytest.raises(InputError, match="--bin-reg belongs to --method lsq, and ewgs"):
        registry.require_own(registry.QAT_METHODS, "ewgs", {"bin_reg": 0.1})
    registry.require_own(registry.QAT_METHODS, "ewgs", {"bin_reg": 0.0, "delta": None, "of nobody": 3})
    lsq = registry.own_options(registry.get(registry.QAT_METHODS, "lsq"), {"bin_reg": 0.1, "delta": None})
    assert lsq == registry.LsqOptions(bin_reg=0.1)
    assert registry.own_options(registry.get(registry.QAT_METHODS, "pact"), {"bin_reg": 0.1}) is None


UNUSED = {"bin_reg": 0.0, "dampen": 0.0, "freeze": 0.0}  # LSQ's


def test_a_method_declares_its_own_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """No config lists them: with an entry that declares it, a field of the config belongs to that entry's method."""
    assert QatConfig(method="ewgs", delta="hessian").own_options == UNUSED | {"delta": None}
    assert QatConfig(method="ewgs", delta="0.5").own_options == UNUSED | {"delta": 0.5}
    assert PalettizeConfig(iterations=5).own_options == {"iterations": 5}

    @dataclass(frozen=True)
    class ToyOptions:
        distill: float = 0.0

    toy = registry.QatEntry("toys:QAT", "a toy", options=ToyOptions())
    monkeypatch.setitem(registry.QAT_METHODS, "toy", toy)
    config = QatConfig(method="toy", distill=0.7)
    assert registry.own_options(toy, config.own_options) == ToyOptions(0.7)
    with pytest.raises(InputError, match="--distill belongs to --method toy, and lsq"):
        QatConfig(method="lsq", distill=0.7)


def test_default_strengths() -> None:
    table: dict[tuple[str, int, int], float] = {
        ("linf", 16, 1200): 0.1,
        ("margin", 16, 1200): 0.1,
        ("margin", 32, 50_000): 0.03,
        ("soft-minmax", 32, 50_000): 0.1,
        ("kure", 32, 50_000): 0.01,
        ("margin", 224, 1_000_000): 0.01,
        ("linf", 224, 1_000_000): 0.01,
        ("clip", 224, 1_000_000): 2,
        ("clip", 16, 1200): 2,
    }
    assert {key: registry.default_strength(key[0], size=key[1], images=key[2]) for key in table} == table
    assert registry.default_strength("margin", size=64, images=900, is_text=True) == 0.01


# --- nothing else names a method -----------------------------------------------------------------------------------

ROOMS: dict[str, list[dict[str, Any]]] = {
    "train": [registry.REGULARIZERS],
    "ptq": [registry.PTQ_METHODS],
    "qat": [registry.QAT_METHODS, registry.REGULARIZERS],
    "palettes": [registry.PALETTE_METHODS, registry.REGULARIZERS],
}
FILES = [path for room in ROOMS for path in sorted((PACKAGE / room).glob("*.py"))]
OWN = {
    PACKAGE.parent / f"{entry.where.partition(':')[0].replace('.', '/')}.py"
    for kinds in ROOMS.values()
    for kind in kinds
    for entry in kind.values()
}


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_but_its_own_names_a_method(path: Path) -> None:
    """Neither in a comparison nor anywhere else in code; and no isinstance of a class that a method's file has."""
    if path in OWN:
        return
    names = {name for kind in ROOMS[path.parent.name] for name in kind}
    concrete = {
        node.name
        for file in OWN
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef) and node.bases
    }
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant):
            assert node.value not in names, f"{path.name}:{node.lineno} names the method {node.value!r}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            asked = {part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)}
            asked |= {part.attr for part in ast.walk(node.args[1]) if isinstance(part, ast.Attribute)}
            assert not asked & concrete, f"{path.name}:{node.lineno} asks for {asked & concrete}"
