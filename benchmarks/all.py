"""Memory, step time and drift with the same options, and a summary (--gpu --out DIR on a GPU)."""

import sys

from benchmarks import drift, memory, record, step_time


def summary(memory_results: dict, step_results: dict, drift_results: dict) -> str:
    """Per variant: memory at the largest depth, memory per block, step time, ratio to remat."""
    lines = [f"{'variant':12s}  {'MiB deepest':>11s}  {'MiB/block':>9s}  {'s/step':>9s}  x remat"]
    for name, step in step_results.items():
        cells = ["", "", "out of memory", ""]
        sizes = memory_results["variants"].get(name)
        if sizes:
            cells[0] = f"{[*sizes['temp_bytes'].values()][-1] / memory.MIB:.1f}"
            cells[1] = f"{sizes['bytes_per_block'] / memory.MIB:.4g}"
        if step:
            cells[2] = f"{step['median']:.4f}"
            cells[3] = f"{step['ratio_to_remat']:.3f}" if "ratio_to_remat" in step else ""
        lines.append(f"{name:12s}  {cells[0]:>11s}  {cells[1]:>9s}  {cells[2]:>9s}  {cells[3]:>7s}")
    rows = drift_results["rows"]
    inexact = [row for row in rows if not row["exact"]]
    lines.append(
        f"drift: {len(rows) - len(inexact)} of {len(rows)} audits exact; "
        + drift.verdict(drift_results)
    )
    lines.append(
        f"compile time: {memory_results['compile']['ratio_of_medians']:.2f} x from the "
        "shallowest to the deepest stack"
    )
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Runs memory, step_time and drift; each writes its own file as soon as it is done."""
    record.parse(record.parser(__doc__), argv)
    results = []
    for benchmark in (memory, step_time, drift):
        print(f"\n== {benchmark.__name__}", flush=True)
        results.append(benchmark.main(argv))
    print("\n== summary\n" + summary(*results), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
