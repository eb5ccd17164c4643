"""The house rules: who imports whom, no cycles, sizes, a fast start, and one version number."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import r2cli

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "r2cli"

# Imports go down only: a room may import from itself and from the rooms above it in this list.
ROOMS = [
    ["errors"],
    ["registry"],
    ["console", "config"],
    ["quantized"],
    ["storage"],
    ["data", "models"],
    ["graph"],
    ["calibration"],
    ["train"],
    ["ptq", "qat", "palettes"],
    ["deploy"],
    ["analysis"],
    ["api", "workflow"],
    ["cli"],
]
# Each of these rooms holds files of names that other rooms may have as well.
NAMES_REPEAT = ("data", "models")
OWNERS = {
    "rich": {"console"},
    "safetensors": {"storage/checkpoint"},
    "onnx": {"deploy", "analysis/onnx_weights", "models/onnx_file", "models/onnx_reading"},
    "onnx_ir": {"deploy"},
    "onnxruntime": {"deploy/runtime"},
    "openvino": {"deploy/engines"},
    "ai_edge_litert": {"deploy/tflite_writer", "deploy/tflite_load"},
    "flatbuffers": {"deploy/tflite_writer"},
    "typer": {"cli"},
    "matplotlib": {"analysis/figure", "analysis/plots", "analysis/style"},
    "transformers": {"models"},
    "tokenizers": {"data"},
    "pickle": set(),
}


def _room(path: Path) -> str:
    """The room that a file stands in, for example 'ptq' for ptq/adaround.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _name(path: Path) -> str:
    """A file's module below r2cli, with slashes: 'ptq/adaround'."""
    return str(path.relative_to(PACKAGE).with_suffix("")).removesuffix("/__init__")


@functools.cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def _imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, `from r2cli import x` as r2cli.x."""
    found = set()
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = sorted(PACKAGE.rglob("*.py"))
PARTS = [path for path in FILES if _room(path) not in ("__init__", "__main__")]
MODULES = {_name(path): path for path in PARTS}


def _own(path: Path) -> set[str]:
    """The files of r2cli that a file imports, as `_name` has them."""
    found = set()
    for name in _imports(path):
        parts = name.split(".")[1:] if name.startswith("r2cli.") else []
        while parts and "/".join(parts) not in MODULES:
            parts.pop()
        if parts:
            found.add("/".join(parts))
    return found


@pytest.mark.parametrize("path", PARTS, ids=_name)
def test_imports_go_down_only(path: Path) -> None:
    level = {room: row for row, rooms in enumerate(ROOMS) for room in rooms}
    own = _room(path)
    for imported in _own(path):
        other = imported.split("/")[0]
        assert other == own or level[other] < level[own], (
            f"{path.name} imports {imported}, which stands beside or below"
        )


def test_no_import_cycles_between_files() -> None:
    edges = {name: _own(path) - {name} for name, path in MODULES.items()}
    done: set[str] = set()
    while ready := {name for name, imported in edges.items() if name not in done and imported <= done}:
        done |= ready
    assert done == set(edges), f"a cycle among {sorted(set(edges) - done)}"


def test_there_are_at_most_twenty_rooms() -> None:
    assert len({_room(path) for path in PARTS}) <= 20


def test_no_two_files_have_one_name() -> None:
    named: dict[str, Path] = {}
    for path in FILES:
        if path.name != "__init__.py" and _room(path) not in NAMES_REPEAT:
            assert path.name not in named, f"{path} and {named[path.name]}"
            named[path.name] = path


def test_no_two_public_classes_have_one_name() -> None:
    named: dict[str, Path] = {}
    for path in FILES:
        for node in _parsed(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                assert node.name not in named, f"{node.name} in {path} and {named[node.name]}"
                named[node.name] = path


@pytest.mark.parametrize("path", PARTS, ids=_name)
def test_a_library_has_one_owner(path: Path) -> None:
    for name in _imports(path):
        owners = OWNERS.get(name.split(".")[0])
        assert owners is None or {_room(path), _name(path)} & owners, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_sizes_stay_readable(path: Path) -> None:
    assert path.read_text().count("\n") <= 400
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.FunctionDef):
            arguments = len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs)
            assert arguments <= 8, f"{path.name}: {node.name} takes {arguments} arguments"
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno <= 60, f"{path.name}: {node.name} is long"


HELP = """
import sys
from r2cli.cli.main import main
try:
    main()
except SystemExit as end:
    heavy = [name for name in ("torch", "onnx", "onnxruntime", "numpy") if name in sys.modules]
    print(end.code, heavy, file=sys.stderr)
"""


@pytest.mark.parametrize("command", [[], ["ptq"]], ids=["r2", "ptq"])
def test_help_is_fast_because_torch_stays_out(command: list[str]) -> None:
    arguments = [sys.executable, "-c", HELP, *command, "--help"]
    ran = subprocess.run(arguments, capture_output=True, text=True)
    assert ran.stderr.strip() == "0 []" and "--help" in ran.stdout


def test_changelog_and_package_agree_on_the_version() -> None:
    versions = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == r2cli.__version__


def _tree(readme: str) -> dict[str, str]:
    """The files in docs/internals.md, by their path below r2cli, with what it says of each; rooms too, as 'ptq/'."""
    block = readme.split("```\nr2cli/\n")[1].split("\ntests/")[0]
    shown, room = {}, ""
    for line in block.splitlines():
        first, _, said = line.strip().partition(" ")
        if line.startswith("  ") and line[2] != " ":
            room = first if first.endswith("/") else ""
            shown[first] = said.strip()
        elif line.startswith("    ") and line[4] != " ":
            shown[room + first] = said.strip()
        if room.removesuffix("/") in (*NAMES_REPEAT, "cli"):  # a line or two of names
            shown |= {room + name: "named" for name in re.findall(r"\w+\.py", line)}
    return shown


def test_the_document_prints_the_tree_as_it_is() -> None:
    shown = _tree((ROOT / "docs/internals.md").read_text())
    there = {str(path.relative_to(PACKAGE)) for path in FILES if path.name != "__init__.py" or path.parent == PACKAGE}
    rooms = {f"{path.parent.name}/" for path in FILES if path.parent != PACKAGE}
    assert set(shown) == there | rooms and all(shown.values())


def test_a_name_in_another_room_is_no_name_in_this_one() -> None:
    readme = (ROOT / "docs/internals.md").read_text()
    line = "    observers.py "
    assert readme.count(line) == 1 and "calibration/observers.py" in _tree(readme)
    moved = readme.replace(line, "    gone.py ").replace("    brecq.py ", f"{line}as brecq.py\n    brecq.py ")
    assert "calibration/observers.py" not in _tree(moved) and "ptq/observers.py" in _tree(moved)


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_a_test_uses_no_private_name(path: Path) -> None:
    """Neither read nor called nor patched: what deserves a test is public, or is tested through what is."""
    own = set()
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("r2cli"):
            own |= {alias.asname or alias.name for alias in node.names}
            assert not [alias.name for alias in node.names if re.match("_[^_]", alias.name)], node.module
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in own:
            assert not re.match("_[^_]", node.attr), f"{node.value.id}.{node.attr}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr":
            patched = [each.value for each in node.args[:2] if isinstance(each, ast.Constant)]
            assert not [name for name in patched if re.search(r"(^|\.)_[^_]|__defaults__", str(name))], patched


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.toml")), ids=lambda path: path.name)
def test_every_recipe_expands(path: Path) -> None:
    from r2cli.workflow import recipe

    assert recipe.steps(recipe.load(path))
