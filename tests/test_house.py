"""The house: what may import what, in no circle, and no file so long that it has a second idea."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Lowest first. A module may import its own layer, as long as there is no circle, and those below.
LIBRARY = [
    ["fixed_point"],
    ["recurrence", "_checks", "_rounding"],
    ["_block", "_parts", "_autodiff", "_call"],
    ["scan", "memory", "losses", "optim"],
    ["audit"],
    ["_flax", "_stack", "sharding"],
    ["nnx", "linen"],
    ["", "baselines", "models"],
    ["lora", "text"],
    ["interop"],
]
TRAIN = [
    ["", "config", "cli"],
    ["datasets"],
    ["data"],
    ["devices"],
    ["tasks"],
    ["run"],
    ["loop"],
    ["inference"],
    ["plan"],
    ["sweep"],
    ["__main__", "report", "prepare", "launch", "generate", "evaluate", "export"],
]
MAY_IMPORT = {
    "bdia_jax": {"bdia_jax"},
    "train": {"train", "bdia_jax"},
    "configs": {"configs"},
    "benchmarks": {"benchmarks", "bdia_jax", "train", "configs"},
    "examples": {"bdia_jax"},
}
LINES = 300
REASON = "over 300 lines because"  # in the module's docstring


def modules() -> dict[str, Path]:
    """name -> file, of everything that is not a test."""
    files = (file for folder in MAY_IMPORT for file in (ROOT / folder).rglob("*.py"))
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    return {name.removesuffix(".__init__"): file for name, file in names.items()}


def imports(file: Path, known: set[str]) -> set[str]:
    """The modules of ours that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in names}
    return found & known


def layer(name: str, layers: list[list[str]]) -> int:
    room = name.partition(".")[2].split(".")[0]
    (found,) = (index for index, rooms in enumerate(layers) if room in rooms)
    return found


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports of what a module must not know."""
    wrong = []
    for name, needed in graph.items():
        top = name.split(".")[0]
        for other in needed:
            layers = {"bdia_jax": LIBRARY, "train": TRAIN}.get(top)
            if other.split(".")[0] not in MAY_IMPORT[top]:
                wrong.append(f"{name} imports {other}")
            elif other.split(".")[0] != top:
                is_private = any(part.startswith("_") for part in other.split("."))
                wrong += [f"{name} imports {other}, which is private"] if is_private else []
            elif layers and layer(other, layers) > layer(name, layers):
                wrong.append(f"{name} imports {other}, which is above it")
    return sorted(wrong)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a circle of imports, [] if there is none."""
    left = {name: set(needed) - {name} for name, needed in graph.items()}
    while done := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in done:
            del left[name]
    return sorted(left)


def too_long(files: dict[str, str]) -> list[str]:
    """Files beyond LINES lines whose docstring gives no reason."""
    return [
        f"{name} has {len(text.splitlines())} lines"
        for name, text in files.items()
        if len(text.splitlines()) > LINES
        and REASON not in (ast.get_docstring(ast.parse(text)) or "").replace("\n", " ")
    ]


@pytest.fixture(scope="module")
def graph():
    files = modules()
    return {name: imports(file, set(files)) for name, file in files.items()}


@pytest.mark.claim("nothing is imported upward or in a circle")
def test_imports_go_down_and_in_no_circle(graph):
    assert len(graph) > 100 and graph["bdia_jax.scan"] >= {"bdia_jax.recurrence"}
    assert upward(graph) == []
    assert circle(graph) == []


@pytest.mark.control("nothing is imported upward or in a circle")
def test_an_import_upward_and_a_circle_are_found(graph):
    bad = graph | {"bdia_jax.recurrence": {"bdia_jax.scan"}, "train.cli": {"bdia_jax._block"}}
    assert "bdia_jax.recurrence imports bdia_jax.scan, which is above it" in upward(bad)
    assert "train.cli imports bdia_jax._block, which is private" in upward(bad)
    assert {"bdia_jax.recurrence", "bdia_jax.scan"} <= set(circle(bad))
    assert upward({"bdia_jax.nnx": {"train.cli"}}) == ["bdia_jax.nnx imports train.cli"]


def test_no_file_is_long_without_a_reason():
    assert too_long({name: file.read_text("utf-8") for name, file in modules().items()}) == []
    text = "x = 1\n" * (LINES + 1)
    assert too_long({"long": text}) == ["long has 301 lines"]
    assert too_long({"long": f'"""Long, {REASON} it is."""\n{text}'}) == []
