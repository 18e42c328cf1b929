"""Files a person may have downloaded or damaged: does each get read, or refused by one line?

    python -m benchmarks.fuzz_files [--cases 10000] [--first 0]

A case is made from its number (`benchmarks.fuzz_file_cases`) and read in a process of its own that
may take _BYTES more memory and _SECONDS. A crash, a traceback, a lack of memory or a late end is a
failure, named with its number.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.fuzz_file_cases import FileCase, make_file
from benchmarks.outcome import ACCEPTED, FAILED, REFUSED
from train.data.tokens import Bpe
from train.loop.log import final_metrics, mended_guard_bits, read_records
from train.prepare import read_source
from train.run.experiment import read_experiment
from train.run.workdir import read_config

_SECONDS, _BYTES = 60, 3 * 2**30
_READERS = {
    "metrics.jsonl": lambda folder: (
        read_records(folder),
        final_metrics(folder),
        mended_guard_bits(folder),
    ),
    "config.json": read_config,
    "experiment.json": read_experiment,
    "tokenizer.json": lambda folder: Bpe.load(folder / "tokenizer.json"),
}


def read_case(case: FileCase, folder: Path) -> tuple[str, str]:
    """(what became of it, what was said). As the programs do, before anything is written."""
    name = case.reader if case.reader in _READERS else "download"
    (folder / name).write_bytes(case.content)
    try:
        if case.reader in _READERS:
            _READERS[case.reader](folder)
        else:
            read_source(case.reader, folder / name, unverified=True)
    except (ValueError, FileNotFoundError) as error:
        ours = type(error) in (ValueError, FileNotFoundError)
        bad = not ours or "more memory" in str(error) or len(str(error)) > 2000
        return FAILED if bad else REFUSED, f"{type(error).__name__}: {str(error)[:500]}"
    except BaseException as error:
        return FAILED, f"{type(error).__name__}: {str(error)[:500]}"
    return ACCEPTED, ""


def apart(case: FileCase, folder: Path, read: Any = read_case) -> tuple[str, str]:
    """read(case, folder) in a process that may die of it, within limits."""
    out, into = os.pipe()
    child = os.fork()
    if not child:
        os.close(out)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + _BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_SECONDS)
        os.write(into, json.dumps(read(case, folder)).encode()[:4000])
        os._exit(0)
    os.close(into)
    with os.fdopen(out, "rb") as said:
        text = said.read()
    _, status = os.waitpid(child, 0)
    if status:
        ended = signal.Signals(status).name if status in set(signal.Signals) else f"status {status}"
        return FAILED, f"the process ended by {ended}"
    kind, message = json.loads(text)
    return kind, message


def fuzz_files(cases: range) -> dict[str, Any]:
    """Counts what becomes of the cases of these numbers, and names the failures."""
    command = [sys.executable, "-m", "benchmarks.fuzz_files", "--worker"]
    command += [f"--cases={len(cases)}", f"--first={cases.start}"]
    here = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": str(here), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _work(cases: range) -> dict[str, Any]:
    counts: dict[str, Counter] = {}
    failures, slowest = [], 0.0
    for number in cases:
        case = make_file(number)
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            kind, message = apart(case, Path(folder))
            message = message.replace(folder, "{S}")
        slowest = max(slowest, time.monotonic() - start)
        counts.setdefault(case.reader, Counter())[kind] += 1
        if kind == FAILED:
            failures.append({"seed": number, "reader": case.reader, "message": message})
            print(json.dumps(failures[-1]), file=sys.stderr, flush=True)
    return {
        "totals": dict(sum(counts.values(), Counter())),
        "readers": {name: dict(each) for name, each in sorted(counts.items())},
        "failures": failures,
        "slowest_seconds": round(slowest, 2),
        "limits": {"seconds": _SECONDS, "bytes": _BYTES},
    }


def main(argv: list[str]) -> dict[str, Any]:
    options = record.parser(__doc__)
    options.add_argument("--cases", type=int, default=10_000)
    options.add_argument("--first", type=int, default=0, help="number of the first case")
    options.add_argument("--worker", action="store_true", help="print the result only")
    args = record.parse(options, argv)
    cases = range(args.first, args.first + args.cases)
    if args.worker:
        results = _work(cases)
        print(json.dumps(results))
        return results
    results = fuzz_files(cases)
    print(results["totals"], results["failures"])
    config = {"cases": args.cases, "first": args.first}
    record.write("fuzz_files", results, config, argv=argv, args=args)
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
