"""The house rules: who imports whom, no cycles, sizes, a fast start, and one version number."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import r2cli

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "r2cli"

# Imports go down only: a module may import from its own row and from the rows above it.
LAYERS = [
    ["errors", "keywords", "values", "options", "console"],
    ["codec", "counts", "grid_search", "tensors", "clip"],
    ["checkpoint"],
    ["attention", "exported"],
    ["models", "data", "graph", "observers", "placement", "regularizers", "rounding", "weights"],
    ["distributed", "resume"],
    ["train", "attach", "activations", "analyze"],
    ["onnx_codes", "onnx_floats", "onnx_functions", "onnx_text"],
    ["ptq", "qat", "palettize", "export", "audit", "verify", "report"],
    ["onnx_weights"],
    ["recipe"],
    ["jobs", "results", "smoke", "cli"],
]
# Methods know nothing of each other, and neither do the places that results go to.
METHODS = ("ptq", "qat", "palettize")
PLACES = ("export", "onnx_codes", "onnx_floats", "onnx_functions", "onnx_text", "audit", "verify")
STRANGERS = [
    *((one, other) for one in METHODS for other in METHODS if one != other),
    *(pair for one in METHODS for place in PLACES for pair in ((one, place), (place, one))),
]
FOLDERS = ("models", "data", "ptq", "qat", "palettize", "cli", "analyze", "report")
OWNERS = {
    "rich": {"console"},
    "safetensors": {"checkpoint"},
    "onnx": {"audit", "verify", "onnx_floats", "onnx_functions", "onnx_text", "onnx_weights"},
    "onnx_ir": {"export", "onnx_codes", "onnx_text"},
    "onnxruntime": {"verify"},
    "typer": {"options", "cli"},
    "matplotlib": {"report"},
    "transformers": {"models"},
    "tokenizers": {"data"},
    "pickle": set(),
}


def _part(path: Path) -> str:
    """The part of the package that a file is, for example 'ptq' for ptq/ranges.py."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, `from r2cli import x` as r2cli.x."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = sorted(PACKAGE.rglob("*.py"))
PARTS = [path for path in FILES if _part(path) not in ("__init__", "__main__")]


def _own(path: Path) -> set[str]:
    """The parts of r2cli that a file imports."""
    names = {name.split(".")[1] for name in _imports(path) if name.startswith("r2cli.")}
    return names - {"__version__"}


@pytest.mark.parametrize("path", PARTS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    level = {part: row for row, parts in enumerate(LAYERS) for part in parts}
    for imported in _own(path):
        assert level[imported] <= level[_part(path)], f"{path.name} imports {imported} from above it"
        assert (_part(path), imported) not in STRANGERS


def test_no_import_cycles_between_parts() -> None:
    edges: dict[str, set[str]] = {}
    for path in PARTS:
        edges.setdefault(_part(path), set()).update(_own(path) - {_part(path)})
    done: set[str] = set()
    while ready := {part for part, imported in edges.items() if part not in done and imported <= done}:
        done |= ready
    assert done == set(edges), f"a cycle among {set(edges) - done}"


@pytest.mark.parametrize("path", PARTS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_library_has_one_owner(path: Path) -> None:
    for name in _imports(path):
        owners = OWNERS.get(name.split(".")[0])
        assert owners is None or _part(path) in owners, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_sizes_stay_readable(path: Path) -> None:
    assert path.read_text().count("\n") <= 400
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            arguments = len(node.args.args) + len(node.args.kwonlyargs)
            # A command has as many parameters as it has options, and their declarations fill lines.
            is_command = path.parent.name == "cli" and node.name == path.stem
            assert is_command or arguments <= 8, f"{path.name}: {node.name} takes {arguments} arguments"
            assert is_command or node.end_lineno - node.lineno < 60, f"{path.name}: {node.name} is long"  # type: ignore[operator]


def test_help_is_fast_because_torch_stays_out() -> None:
    heavy = "('torch', 'onnx', 'onnxruntime', 'numpy')"
    code = f"import sys; import r2cli.cli; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_changelog_and_package_agree_on_the_version() -> None:
    versions = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == r2cli.__version__


def test_the_readme_prints_the_tree_as_it_is() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in FILES:
        name = path.relative_to(PACKAGE)
        in_folder = len(name.parts) > 1 and name.parts[0] in FOLDERS
        shown = f"{name.parts[0]}/" if in_folder else name.name
        assert shown in readme and (len(name.parts) == 1 or path.name == "__init__.py" or path.name in readme), name


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.toml")), ids=lambda path: path.name)
def test_every_recipe_expands(path: Path) -> None:
    from r2cli import recipe

    assert recipe.steps(recipe.load(path))
