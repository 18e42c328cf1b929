"""Memory, step time, limits, compile time and drift, and a summary (--gpu --out DIR on a GPU)."""

import sys
from typing import Any

from benchmarks import compile_time, drift, limits, memory, record, step_time
from benchmarks.stack import MIB, VARIANTS

RUNS = (memory, step_time, limits, compile_time, drift)
COLUMNS = ("MiB deepest", "MiB/block", "s/step", "x plain", "x remat")
COLUMNS += ("% of peak", "batch", "tokens")


def summary(results: dict[str, Any]) -> str:
    """A row a variant: memory at the largest depth and per block, step time, what fits."""
    lines = ["  ".join([f"{'variant':12s}", *(f"{column:>11s}" for column in COLUMNS)])]
    for name in VARIANTS:
        cells = _cells(results, name)
        if any(cells):
            lines.append("  ".join([f"{name:12s}", *(f"{cell:>11s}" for cell in cells)]))
    rows = results["drift"]["rows"]
    inexact = [row for row in rows if not row["exact"]]
    lines.append(
        f"drift: {len(rows) - len(inexact)} of {len(rows)} audits exact; "
        + drift.verdict(results["drift"])
    )
    ratios = [
        f"{name} {row['ratio_of_medians']:.2f} x" for name, row in results["compile_time"].items()
    ]
    lines.append(f"compile time, deepest over shallowest stack: {', '.join(ratios)}")
    return "\n".join(lines)


def _cells(results: dict[str, Any], name: str) -> list[str]:
    """One for each of COLUMNS; empty where this variant was not measured."""
    cells = [""] * len(COLUMNS)
    sizes = results["memory"]["variants"].get(name)
    if sizes:
        cells[0] = f"{[*sizes['temp_bytes'].values()][-1] / MIB:.1f}"
        cells[1] = f"{sizes['bytes_per_block'] / MIB:.4g}"
    step = results["step_time"].get(name)
    if step:
        cells[2] = f"{step['median']:.4f}"
        cells[3] = f"{step['ratio_to_plain']:.3f}" if "ratio_to_plain" in step else ""
        cells[4] = f"{step['ratio_to_remat']:.3f}" if "ratio_to_remat" in step else ""
        cells[5] = f"{100 * step['utilization']:.1f}"
    elif name in results["step_time"]:
        cells[2] = "no memory"
    for column, axis in ((6, "batch"), (7, "tokens")):
        limit = results["limits"][axis].get(name)
        cells[column] = str(limit["size"]) if limit else ""
    return cells


def main(argv: list[str]) -> None:
    """Runs them in turn; each writes its own file as soon as it is done."""
    record.parse(record.parser(__doc__), argv)
    results = {}
    for benchmark in RUNS:
        print(f"\n== {benchmark.__name__}", flush=True)
        results[benchmark.__name__.split(".")[-1]] = benchmark.main(argv)
    print("\n== summary\n" + summary(results), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
