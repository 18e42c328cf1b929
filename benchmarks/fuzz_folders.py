"""Wrong Hugging Face folders: is each accepted, or refused by an error of ours?

    python -m benchmarks.fuzz_folders [--cases 2000] [--first 0]

A case is made from its number: fields of config.json, the header of a safetensors file (lengths,
offsets, shapes, dtypes, names), the index, or bytes of any file are spoilt. It is loaded, and what
is accepted is saved again, as `benchmarks.fuzz` runs a command line: in one line, within a minute,
and without asking for much memory.
"""

import json
import shutil
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from bdia_jax import interop
from bdia_jax.interop.files import CONFIG, INDEX, TENSORS
from bdia_jax.interop.generation import GENERATION
from bdia_jax.models.gpt2 import GPT2
from bdia_jax.models.llama import Llama
from bdia_jax.models.rope import RopeScaling
from bdia_jax.models.vit import ViT
from benchmarks import record
from benchmarks.fuzz_cases import VALUES, misspelt, pick, spoil
from benchmarks.outcome import FAILED, REFUSED, Outcome, outcome_of
from train import cli

_SIZES = {"width": 8, "depth": 2, "num_heads": 2, "mlp_dim": 8}
_TEXT = _SIZES | {"vocab_size": 9, "max_len": 8}
_ROPE = RopeScaling("llama3", 4.0, 1.0, 4.0, 4)
_MAKERS: dict[str, Callable[..., nnx.Module]] = {  # by the model_type that the folder says
    "gpt2": lambda **options: GPT2(**_TEXT, **options),
    "llama": lambda **options: Llama(**_TEXT, rope_scaling=_ROPE, **options),
    "mistral": lambda **options: Llama(**_TEXT, sliding_window=3, tie_embeddings=True, **options),
    "qwen2": lambda **options: Llama(**_TEXT, qkv_bias=True, **options),
    "qwen3": lambda **options: Llama(**_TEXT, qk_norm=True, **options),
    "vit": lambda **options: ViT((8, 8, 3), 2, **_SIZES, **options),
}
_JSON = [value for value in VALUES if isinstance(value, bool | int | float | str | list | dict)]
_JSON = [None, *(value for value in _JSON if value not in (10**5000, {1: 2}))]
_DTYPES = "F64 F32 F16 BF16 I64 I8 U8 BOOL F8_E4M3 F4 C64 f32 Q"


def make_folders(folder: Path) -> None:
    """Sound ones, of every model_type; "sharded" has an index."""
    for name, make in _MAKERS.items():
        interop.save(make(rngs=nnx.Rngs(0)), folder / name)
        (folder / name / GENERATION).write_text('{"eos_token_id": [7, 8]}')
    shutil.copytree(folder / "gpt2", folder / "sharded")
    (folder / "sharded" / TENSORS).unlink()
    interop.save(_MAKERS["gpt2"](rngs=nnx.Rngs(0)), folder / "parts", max_shard_bytes=1500)
    for file in (folder / "parts").glob("model*"):
        file.rename(folder / "sharded" / file.name)
    shutil.rmtree(folder / "parts")


def spoil_folder(seed: int, sound: Path, folder: Path) -> str:
    """Makes `folder` of one of the sound ones, spoilt; the same for the same number.

    Returns:
        What was done, in a few words.
    """
    rng = np.random.default_rng(seed)
    name = pick(rng, [*_MAKERS, "sharded"])
    shutil.copytree(sound / name, folder)
    ways: list[Callable[..., None]] = [_config] * 6 + [_header] * 5 + [_bytes] * 3 + [_generation]
    if name == "sharded":
        ways += [_index] * 9
    way = pick(rng, ways)
    way(rng, folder)
    return f"{name}, {way.__name__.removeprefix('_')}"


def open_folder(folder: Path, out: Path) -> None:
    """What a person does with one: reads all of it, and writes it again."""
    model = interop.load(folder, rngs=nnx.Rngs(0))
    interop.read_end_tokens(folder)
    interop.save(model, out, source=folder)
    interop.read_architecture(out)


def _config(rng, folder: Path) -> None:
    """Fields of config.json, and of the objects in it."""
    config = json.loads((folder / CONFIG).read_text())
    objects = [config, *(value for value in config.values() if isinstance(value, dict) and value)]
    if rng.random() < 0.1:  # sizes that are large each, and enormous together
        sizes = [name for name, value in config.items() if type(value) is int]
        for name in rng.choice(sizes, int(rng.integers(1, 5)), replace=False):
            config[str(name)] = int(pick(rng, (2**31 - 1, 2**31 - 2, 2**30, 1)))
    else:
        spoil(rng, pick(rng, objects) if rng.random() < 0.3 else config, _JSON)
    (folder / CONFIG).write_text(json.dumps(config))


def _generation(rng, folder: Path) -> None:
    ends = pick(rng, _JSON) if rng.random() < 0.5 else [7, pick(rng, _JSON)]
    (folder / GENERATION).write_text(json.dumps({"eos_token_id": ends}))


def _index(rng, folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    if rng.random() < 0.3:
        spoil(rng, index, _JSON)
    else:
        files = ("..", ".", "", "/etc/passwd", "no.safetensors", CONFIG, "a\0b", "x" * 300)
        spoil(rng, index["weight_map"], [*_JSON, *files, *index["weight_map"].values()])
    (folder / INDEX).write_text(json.dumps(index))


def _header(rng, folder: Path) -> None:
    """The header of a safetensors file: lengths, offsets, shapes, dtypes, names."""
    file = pick(rng, sorted(folder.glob("*.safetensors")))
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, tensors = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    for name in rng.choice(names, min(len(names), int(rng.integers(1, 3))), replace=False):
        _spoil_tensor(rng, header, str(name), str(pick(rng, names)))
    written = json.dumps(header).encode()
    declared = len(written)
    if rng.random() < 0.2:
        declared = int(pick(rng, (0, 1, declared - 1, declared + 1, len(data), 2**31, 2**63, 1e8)))
    file.write_bytes(struct.pack("<Q", declared) + written + tensors)


def _spoil_tensor(rng, header: dict[str, Any], name: str, other: str) -> None:
    if name not in header or other not in header:
        return
    entry, kind = header[name], int(rng.integers(8))
    first, last = entry["data_offsets"]
    number = int(pick(rng, (0, 1, -1, 2**31, 2**40, 2**63 - 1, 2**64 - 1, last + 4, first - 4)))
    if kind == 0:
        entry["data_offsets"] = header[other]["data_offsets"]
    elif kind == 1:
        entry["data_offsets"][int(rng.integers(2))] = number
    elif kind == 2:
        shape = entry["shape"]
        shape[int(rng.integers(len(shape)))] = number
    elif kind == 3:
        entry["shape"] = pick(rng, (entry["shape"][::-1], [], [number] * 3, [*entry["shape"], 1]))
    elif kind == 4:
        entry["dtype"] = pick(rng, _DTYPES)
    elif kind == 5:
        del header[name]
    elif kind == 6:
        names = (misspelt(rng, name), "h.999999999999.ln_1.bias", "", "a\nb", "x" * 5000)
        header[pick(rng, names)] = header.pop(name)
    else:
        entry[pick(rng, ("dtype", "shape", "data_offsets", "more"))] = pick(rng, _JSON)


def _bytes(rng, folder: Path) -> None:
    """Bytes of any file: flipped, cut off, added; or no file but a folder or a link."""
    file = pick(rng, sorted(folder.iterdir()))
    data, kind = bytearray(file.read_bytes()), int(rng.integers(6))
    if kind == 0:
        del data[int(rng.integers(len(data))) :]
    elif kind == 1:
        data += rng.bytes(int(rng.integers(1, 9)))
    elif kind == 2:
        data = bytearray(rng.bytes(int(rng.integers(0, 500))))
    elif kind < 5:
        for place in rng.integers(min(len(data), 3000), size=int(rng.integers(1, 4))):
            data[place] ^= 1 << int(rng.integers(8))
    file.unlink()
    if kind < 5:
        file.write_bytes(data)
    elif rng.random() < 0.5:
        file.mkdir()
    else:
        file.symlink_to(pick(rng, ("/etc/passwd", "nothing", file.name)))


def run_folder(seed: int, scratch: Path) -> Outcome:
    """What becomes of the case of a number.

    Args:
        seed: the number.
        scratch: a folder in which `make_folders` made "sound".
    """
    folder, out = scratch / "folder", scratch / "written"
    done = spoil_folder(seed, scratch / "sound", folder)

    def open_it() -> None:
        with cli.told():
            open_folder(folder, out)

    kind, message = outcome_of(open_it)
    for made in (folder, out):
        shutil.rmtree(made, ignore_errors=True)
    if kind == REFUSED and ("\n" in message or len(message) > 1000):
        kind = FAILED  # more than a line
    return Outcome(kind, f"{done}: {message.replace(str(scratch), '')}")


def fuzz_folders(scratch: Path, cases: range) -> dict[str, Any]:
    """Counts what becomes of the cases of these numbers, and names the failures."""
    make_folders(scratch / "sound")
    counts: dict[str, Counter] = {}
    failures = []
    for number in cases:
        outcome = run_folder(number, scratch)
        spoilt = outcome.message.partition(":")[0].split(", ")[1]
        counts.setdefault(spoilt, Counter())[outcome.kind] += 1
        if outcome.kind == FAILED:
            failures.append({"seed": number, "message": outcome.message})
            print(json.dumps(failures[-1]), flush=True)
    return {
        "totals": dict(sum(counts.values(), Counter())),
        "spoilt": {name: dict(each) for name, each in sorted(counts.items())},
        "failures": failures,
    }


def main(argv: list[str]) -> dict[str, Any]:
    options = record.parser(__doc__)
    options.add_argument("--cases", type=int, default=2000)
    options.add_argument("--first", type=int, default=0, help="number of the first case")
    args = record.parse(options, argv)
    with tempfile.TemporaryDirectory() as made:
        results = fuzz_folders(Path(made), range(args.first, args.first + args.cases))
    print(results["totals"])
    asked = {"cases": args.cases, "first": args.first}
    record.write("fuzz_folders", results, asked, argv=argv, args=args)
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
