"""The house: what may import what, in no circle, and no file so long that it has a second idea."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Lowest first. A module may import its own layer, as long as there is no circle, and those below.
LIBRARY = [
    ["fixed_point", "_jaxprs", "_mesh", "compiled"],
    ["recurrence", "_checks", "_derivatives", "rounding", "_recompute", "_verify"],
    ["_block", "_loop", "_parts", "_autodiff", "_updating", "_call"],
    ["scan", "memory", "losses", "optim", "per_block"],
    ["audit", "remat"],
    ["_constructor", "_flax", "_stack", "_linen", "sharding"],
    ["nnx", "linen", "_update_step"],
    ["in_backward"],
    ["", "baselines", "models"],
    ["lora", "text"],
    ["interop"],
]
TRAIN = [
    ["", "fields", "config", "cli"],
    ["datasets"],
    ["data"],
    ["devices"],
    ["tasks"],
    ["run"],
    ["loop"],
    ["inference"],
    ["plan"],
    ["report"],
    ["sweep"],
    ["__main__", "prepare", "launch", "generate", "evaluate", "export"],
]
MAY_IMPORT = {
    "bdia_jax": {"bdia_jax"},
    "train": {"train", "bdia_jax"},
    "configs": {"configs"},
    "benchmarks": {"benchmarks", "bdia_jax", "train", "configs"},
    "examples": {"examples", "bdia_jax"},
}
LINES = 300
REASON = "over 300 lines because"  # in the docstring of a file that is
LAYERS = {
    f"{top}.{room}".removesuffix("."): layer
    for top, layers in {"bdia_jax": LIBRARY, "train": TRAIN}.items()
    for layer, rooms in enumerate(layers)
    for room in rooms
}


def modules() -> dict[str, Path]:
    """name -> file, of all that is not a test."""
    files = (file for folder in MAY_IMPORT for file in (ROOT / folder).rglob("*.py"))
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    return {name.removesuffix(".__init__"): file for name, file in names.items()}


def packages(module: str) -> set[str]:
    """Those that it is in, which are imported before it."""
    parts = module.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts))}


def imports(module: str, text: str, known: set[str]) -> set[str]:
    """Those of the known modules that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in names}
    for needed in found & known:
        found |= packages(needed) - packages(module) - {module}
    return found & known


def layer(module: str) -> int | None:
    return LAYERS.get(".".join(module.split(".")[:2]))


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports of what a module must not know."""
    wrong = []
    for module, needed in graph.items():
        top = module.split(".")[0]
        if top in ("bdia_jax", "train") and layer(module) is None:
            wrong.append(f"{module} has no layer: give it one, in {Path(__file__).name}")
            continue
        for other in needed:
            if other.split(".")[0] not in MAY_IMPORT[top]:
                wrong.append(f"{module} imports {other}")
            elif other.split(".")[0] != top:
                if "._" in other.removesuffix("__main__"):
                    wrong.append(f"{module} imports {other}, which is private")
            elif (layer(other) or 0) > (layer(module) or 0):
                wrong.append(f"{module} imports {other}, which is above it")
    return sorted(wrong)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules each of which is imported by the next, the last being the first; [] if none are."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def too_long(texts: dict[str, str]) -> list[str]:
    """Modules of more than LINES lines whose docstring gives no reason."""
    return [
        f"{module} has {len(text.splitlines())} lines; say in its docstring: {REASON} ..."
        for module, text in texts.items()
        if len(text.splitlines()) > LINES
        and REASON not in (ast.get_docstring(ast.parse(text)) or "").replace("\n", " ")
    ]


@pytest.fixture(scope="module")
def texts():
    return {module: file.read_text("utf-8") for module, file in modules().items()}


@pytest.fixture(scope="module")
def graph(texts):
    return {module: imports(module, text, texts.keys()) for module, text in texts.items()}


@pytest.mark.claim("nothing is imported upward or in a circle")
def test_imports_go_down_and_in_no_circle(graph):
    assert graph["bdia_jax.scan"] >= {"bdia_jax.recurrence"}
    wrong = upward(graph)
    assert not wrong, "\n".join(wrong)
    assert circle(graph) == []


@pytest.mark.control("nothing is imported upward or in a circle")
@pytest.mark.parametrize(
    ("module", "text", "told"),
    [
        ("bdia_jax.recurrence", "from bdia_jax import scan", " bdia_jax.scan, which is above it"),
        ("bdia_jax.nnx", "def f():\n from train.cli import main", " train.cli"),
        ("train.cli", "from bdia_jax._block import x", " bdia_jax._block, which is private"),
        ("train.cli", "import train.loop.train", " train.loop.train, which is above it"),
        ("configs.vit_digits", "import bdia_jax", " bdia_jax"),
    ],
)
def test_an_import_upward_is_told(graph, module, text, told):
    found = upward({module: imports(module, text, graph.keys())})
    assert f"{module} imports{told}" in found


@pytest.mark.control("nothing is imported upward or in a circle")
def test_a_circle_is_told(graph):
    names = ("bdia_jax.recurrence", "bdia_jax.scan")
    few = {module: graph[module] & set(names) for module in names}
    assert circle(few) == []
    few["bdia_jax.recurrence"] |= imports("", "from bdia_jax.scan import bdia_scan", set(names))
    assert set(circle(few)) == set(names)


def test_a_package_is_imported_before_what_is_in_it():
    known = {"train", "train.run", "train.run.workdir", "train.cli"}
    text = "from train.run.workdir import open_workdir"
    assert imports("train.cli", text, known) == {"train.run", "train.run.workdir"}
    assert imports("train.run.record", text, known) == {"train.run.workdir"}


def test_no_file_is_long_without_a_reason(texts):
    wrong = too_long(texts)
    assert not wrong, "\n".join(wrong)
    text = "x = 1\n" * (LINES + 1)
    assert len(too_long({"long": text})) == 1
    assert too_long({"long": f'"""Long, {REASON} it is."""\n{text}'}) == []
