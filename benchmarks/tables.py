"""Every measured number of README.md and docs/, written from the files in benchmarks/results/.

    python -m benchmarks.tables            writes them
    python -m benchmarks.tables --check    exits with 1 if one on disk is another, and says which

In a page a table stands between `<!-- table: NAME -->` and `<!-- end -->`, its definition in
tables.toml, and a single number between `<!--n REFERENCE-->` and `<!--/n-->`. A reference is
FILE:KEY/KEY; HOW; HOW:

    memory:results/variants/plain/temp_bytes/6; MiB
    vit_cifar10_small:results/plain/curves/eval/loss/1; min; .2f

FILE is a .json in the folder, a .csv there (its first key is a run), or one of `VIEWS`, where rows
have to be added up or named. A key with * is a pattern, and makes a list of what follows. Each HOW
is one of the dict `HOW`, or a format of Python's. If a reference begins with "?" and leads nowhere,
nothing is written.
"""

import argparse
import contextlib
import csv
import importlib
import json
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cache
from itertools import zip_longest
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).parent.parent
TABLES = tomllib.loads((ROOT / "benchmarks" / "tables.toml").read_text("utf-8"))
HOW: dict[str, Callable[[Any], Any]] = {
    "MiB": lambda size: f"{size / 2**20:.0f} MiB",
    "MiB.1": lambda size: f"{size / 2**20:.1f} MiB",
    "MiB.2": lambda size: f"{size / 2**20:.2f} MiB",
    "MiB~": lambda size: f"{round(size / 2**20, 4):.3g} MiB",
    "GiB": lambda size: f"{size / 2**30:.1f} GiB",
    "ms": lambda seconds: f"{1e3 * seconds:.1f} ms",
    "GB": lambda size: f"{size / 1e9:.1f}",
    "percent": lambda share: f"{100 * share:.2f} %",
    "scatter": lambda values: "{mean:.4f} ± {std:.4f}".format(**values),
    "len": len,
    "min": min,
    "max": max,
    "sum": lambda values: sum(values.values() if isinstance(values, dict) else values),
    "mean": mean,
    "means": lambda lists: [mean(each) for each in lists],
    "first 5": lambda values: mean(values[:5]),
    "last 5": lambda values: mean(values[-5:]),
}
TABLE = re.compile(r"(<!-- table: (\w+) -->)(.*?)(<!-- end -->)", re.DOTALL)
NUMBER = re.compile(r"(<!--n ([^>]*?)-->)(.*?)(<!--/n-->)", re.DOTALL)
_MARKER = re.compile(r"<!-- table:|<!-- end -->|<!--n |<!--/n-->")

Load = Callable[[str], Any]  # the content of a file, by its name


def _paper_memory(load: Load) -> dict[str, float]:
    sizes = load("vit_memory")["config"]["paper_mb"]
    return {run: size / sizes["plain"] for run, size in sizes.items()}


def _drift_sums(load: Load) -> dict[str, dict[str, str]]:
    sums, rows = {}, load("drift")["results"]["rows"]
    for numerics in {row["numerics"] for row in rows}:
        of_it = [row for row in rows if row["numerics"] == numerics]
        drifts = [row["max_drift"] for row in of_it]
        sums[numerics] = {"drift": "over 63" if None in drifts else f"{max(drifts):.2g}"}
        for bits in (0, 1):
            found = [row for row in of_it if row["guard_bits"] == bits]
            wrong, elements = (sum(r[n] for r in found) for n in ("mismatches", "elements"))
            sums[numerics][f"wrong_{bits}"] = f"{wrong:,} of {elements:,}"
    return sums


def _losses(load: Load) -> dict[str, dict[str, dict[str, str]]]:
    """Of the sweeps that turn |gamma|: over seeds, and against the plain run of the same seed."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    sweeps = "dial_text", "dial_text_little", "dial_cifar10_little", "smollm2_e2e"
    for name in (*sweeps, "smollm2_shakespeare"):
        runs = load(name)["results"]
        found[name] = {run: against(runs["plain"], row) for run, row in runs.items()}
    return found


def against(plain: dict[str, Any], run: dict[str, Any]) -> dict[str, str]:
    cells = {}
    for when in ("final", "best"):
        losses = run[when]["loss"]
        more = [a - b for a, b in zip(losses, plain[when]["loss"], strict=True)]
        cells[when] = f"{mean(losses):.3f} ± {stdev(losses):.3f}"
        cells[f"{when}_over_plain"] = f"{mean(more):+.4f} ± {stdev(more):.4f}"
    return cells


def _meshes(load: Load) -> dict[str, Any]:
    return {_axes(row["mesh"]): row for row in load("communication")["results"]["bytes"]}


def _plans(load: Load) -> dict[str, Any]:
    planned = load("plan")["results"]["planned"]
    where = "{model} on {devices} x {device}, "
    return {where.format(**plan) + _axes(plan["mesh"]): plan for plan in planned}


def _axes(mesh: Mapping[str, int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in mesh.items())


def _experiments(load: Load) -> dict[str, dict[str, str]]:
    """What each file in configs/ says of itself: its first line, the paper's numbers, and ours."""
    rows = {}
    for path in sorted((ROOT / "configs").glob("*_*.py")):
        module = importlib.import_module(f"configs.{path.stem}")
        if hasattr(module, "PAPER"):
            title = (module.__doc__ or "").splitlines()[0].rstrip(".")
            paper = ", ".join(f"`{run}` {number:.2f}" for run, number in module.PAPER.items())
            title = title.removesuffix(" of arXiv 2407.09093").replace("|", "\\|")
            rows[f"`{path.name}`"] = {"what": title, "paper": paper}
            for scale in ("tiny", "small"):
                with contextlib.suppress(FileNotFoundError):
                    runs = load(f"{path.stem}_{scale}")["results"]
                    rows[f"`{path.name}`"] |= {"scale": f"`:{scale}`", "ours": _in_a_cell(runs)}
    return rows


def _in_a_cell(runs: dict[str, Any]) -> str:
    """Of each run the accuracy in %, or the loss at the end and at its best; +- over seeds."""

    def numbers(run: dict[str, Any]) -> str:
        final = run["final"]
        if accuracies := final.get("accuracy"):
            return _with_scatter([100 * each for each in accuracies], 2)
        best = _with_scatter(run["best"]["loss"], 3)
        return f"{_with_scatter(final['loss'], 3)}, at best {best}"

    return "; ".join(f"`{name}` {numbers(run)}" for name, run in runs.items())


def _with_scatter(values: list[float], digits: int) -> str:
    scatter = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{scatter}"


VIEWS: dict[str, Callable[[Load], dict[str, Any]]] = {
    "paper_memory": _paper_memory,
    "drift_sums": _drift_sums,
    "losses": _losses,
    "meshes": _meshes,
    "plans": _plans,
    "experiments": _experiments,
}


class Results:
    """The result files below `root`, by reference."""

    def __init__(self, root: Path = ROOT):
        self._folder = root / "benchmarks" / "results"
        self._load = cache(self._read)

    def _read(self, name: str) -> Any:
        if name in VIEWS:
            return VIEWS[name](self._load)
        path = self._folder / name
        if path.suffix == ".csv":
            with path.open(encoding="utf-8") as file:
                return {row["run"]: row for row in csv.DictReader(file)}
        return json.loads(path.with_suffix(".json").read_text("utf-8"))

    def value(self, reference: str) -> str:
        """What a reference leads to, as text.

        Raises:
            ValueError: to nothing, or to what cannot be written so.
        """
        place, *hows = (part.strip() for part in reference.split(";"))
        file, _, keys = place.removeprefix("?").partition(":")
        try:
            value = _field(self._load(file), keys.split("/"))
            for how in hows:
                spec, _, unit = how.partition(" ")
                value = HOW[how](value) if how in HOW else f"{value:{spec}} {unit}".rstrip()
        except (OSError, LookupError, TypeError, ValueError) as error:
            if place.startswith("?"):
                return ""
            raise ValueError(f"{reference}: {type(error).__name__} {error}") from error
        return str(value)

    def table(self, name: str) -> str:
        """The lines of one of TABLES."""
        table = TABLES[name]
        columns, rows = table["columns"], table["rows"]
        if isinstance(rows, str):
            rows = {key: key for key in self._load(rows)}
        lines = [[table.get("corner", ""), *columns], ["---"] * (1 + len(columns))]
        for label, keys in rows.items():
            keys = [keys] if isinstance(keys, str) else keys
            lines.append([label, *(self._cell(table["base"], c, keys) for c in columns.values())])
        return "".join("|" + "".join(f" {c} |" if c else " |" for c in ln) + "\n" for ln in lines)

    def _cell(self, base: str, references: str, keys: list[str]) -> str:
        whole = (each if ":" in each else base + each for each in references.split(" / "))
        return " / ".join(self.value(each.format(*keys)) for each in whole)

    def right(self, text: str) -> str:
        """A page with its tables and numbers as the files have them.

        Raises:
            ValueError: a marker without its other half, or a table or reference there is none of.
        """
        found = [*TABLE.finditer(text), *NUMBER.finditer(text)]
        if 2 * len(found) != len(_MARKER.findall(text)):
            raise ValueError("a marker of a table or a number lacks its other half")
        if at_start := re.search(r"^ *<!--n .*", text, re.MULTILINE):
            raise ValueError(f"{at_start[0]}: at the start of a line it would end the paragraph")
        for match in TABLE.finditer(text):
            if match[2] not in TABLES:
                raise ValueError(f"no table {match[2]}; tables.toml has {', '.join(TABLES)}")
        text = TABLE.sub(lambda match: f"{match[1]}\n\n{self.table(match[2])}\n{match[4]}", text)
        return NUMBER.sub(lambda match: f"{match[1]}{self.value(match[2])}{match[4]}", text)


def _field(value: Any, keys: list[str]) -> Any:
    for index, key in enumerate(keys):
        if "*" in key:
            names = [name for name in value if fnmatchcase(name, key)]
            return [_field(value[name], keys[index + 1 :]) for name in names]
        value = value[int(key) if isinstance(value, list) else key]
    return value


def pages(root: Path = ROOT) -> list[Path]:
    """The files that may have tables."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def differences(root: Path = ROOT) -> Iterator[str]:
    """A line for each table and number on disk that is not as the results say."""
    results, unused = Results(root), set(TABLES)
    for path in pages(root):
        name, text = path.relative_to(root), path.read_text("utf-8")
        try:
            right = results.right(text)
        except ValueError as error:
            yield f"{name}: {error}"
            continue
        unused -= {match[2] for match in TABLE.finditer(text)}
        for pattern, what in ((TABLE, "table"), (NUMBER, "number")):
            for old, new in zip(pattern.finditer(text), pattern.finditer(right), strict=True):
                if old[3] != new[3]:
                    rows = zip_longest(old[3].split("\n"), new[3].split("\n"), fillvalue="nothing")
                    has, expected = next((a, b) for a, b in rows if a != b)
                    yield f"{name}, {what} {old[2]}: has {has!r}, expected {expected!r}"
    if unused:
        yield f"no page has the tables {', '.join(sorted(unused))} of tables.toml"


def main(argv: list[str], root: Path = ROOT) -> None:
    """Writes the pages, or checks them. Exits with what is wrong, and status 1."""
    options = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("--check", action="store_true", help="write nothing")
    if not options.parse_args(argv).check:
        for path in pages(root):
            text = path.read_text("utf-8")
            try:
                path.write_text(Results(root).right(text), "utf-8")
            except ValueError as error:
                sys.exit(f"error: {path.relative_to(root)}: {error}")
    if wrong := [*differences(root)]:
        sys.exit("\n".join(["error: run python -m benchmarks.tables", *wrong]))


if __name__ == "__main__":
    main(sys.argv[1:])
