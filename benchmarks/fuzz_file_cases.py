"""Downloaded files that are wrong, harmful or damaged in one way or another, made from a number."""

import bz2
import functools
import gzip
import io
import json
import lzma
import pickle
import struct
import tarfile
import zipfile
from typing import Any, NamedTuple

import numpy as np

from train.datasets.registry import LOCAL

_WORKDIR = ("metrics.jsonl", "config.json", "experiment.json", "tokenizer.json")


class FileCase(NamedTuple):
    """reader: a set of `train.prepare`, or the name of a file in a workdir."""

    reader: str
    content: bytes


def make_file(seed: int) -> FileCase:
    """The same case for the same number."""
    rng = np.random.default_rng(seed)
    reader = str(rng.choice([*LOCAL, *_WORKDIR]))
    if reader in _WORKDIR:
        return FileCase(reader, _damaged(rng, _lines(rng, reader)))
    if rng.random() < 0.01:
        return FileCase(reader, _bomb(int(rng.integers(4)), bool(rng.integers(2))))
    names = [*LOCAL[reader].KNOWN.files]
    if rng.random() < 0.1:
        names = [str(rng.choice([*names, "../x", "/etc/x", "a" * 5000, "-"])) for _ in names]
    files = {name: _damaged(rng, _content(rng, reader, name), 0.1) for name in names}
    return FileCase(reader, _damaged(rng, _packed(rng, files), 0.2))


def _damaged(rng: np.random.Generator, data: bytes, share: float = 0.6) -> bytes:
    if rng.random() > share or not data:
        return data
    kind, place = int(rng.integers(4)), int(rng.integers(len(data)))
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + rng.bytes(int(rng.integers(1, 9))) + data[place:]
    if kind == 2:
        return data[:place] + data[int(rng.integers(len(data))) :]
    flipped = bytearray(data)
    for index in rng.integers(len(data), size=int(rng.integers(1, 9))):
        flipped[index] ^= 1 << int(rng.integers(8))
    return bytes(flipped)


def _packed(rng: np.random.Generator, files: dict[str, bytes]) -> bytes:
    ways: list[Any] = [bytes, gzip.compress, bz2.compress, lzma.compress]
    compress = ways[int(rng.integers(4))]
    kind = int(rng.integers(4))
    if kind == 0 and len(files) == 1:
        return compress(*files.values())
    buffer = io.BytesIO()
    if kind == 1:
        method = (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
        with zipfile.ZipFile(buffer, "w", method[int(rng.integers(4))]) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return buffer.getvalue()
    form = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[int(rng.integers(3))]
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name[:90])
            member.size = len(content)
            if rng.random() < 0.05:
                types = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
                member.type, member.linkname = types[int(rng.integers(4))], "/dev/zero"
                member.size = 0
            archive.addfile(member, io.BytesIO(content))
    return compress(buffer.getvalue())


@functools.cache
def _bomb(kind: int, lines: bool) -> bytes:
    """1.6 GB in a few hundred KB or less."""
    piece = (b'{"text": "a"}\n' * 2**20)[: 2**24] if lines else bytes(2**24)
    if kind < 3:
        return (gzip.compress, bz2.compress, lzma.compress)[kind](piece) * 100
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for number in range(20):
            archive.writestr(f"{number}/train", piece)
        archive.writestr("openwebtext.jsonl", piece * 17)
    return buffer.getvalue()


def _content(rng: np.random.Generator, reader: str, name: str) -> bytes:
    if reader.startswith("cifar"):
        return _pickle(rng, reader, name)
    if reader == "openwebtext_sample":
        return b"\n".join(_json(rng, {"text": f"page {n}"}) for n in range(60))
    if reader == "tinyshakespeare":
        ends = ("\n\n", "\n", "\r\n", "\n\n\n\n", "\0", "\u2028", "")
        return "".join(f"ROMEO {n}:{ends[int(rng.integers(7))]}" * 40 for n in range(60)).encode()
    header = {"e2e": "mr,ref", "kaggle_enfr": "English words/sentences,French words/sentences"}
    rows = [header[reader], *(f"one {n},un {n}" for n in range(400))]
    odd = ('"', '"a\nb",c', ",", "a,b,c", "x" * 200_000 + ",y", "\0,\0", "\ufeff,a", '"a""b",c')
    for _ in range(int(rng.integers(3)) * (rng.random() < 0.2)):
        rows.insert(int(rng.integers(len(rows))), odd[int(rng.integers(len(odd)))])
    return "\n".join(rows).encode()


_ODD_JSON = (
    *(b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"1e999", b"NaN", b"null", b"[]", b'""'),
    *(b'{"text": 3}', b'{"text": "\\ud800"}', b'{"text": null}', b"\xff\xfe", b"{}", b'{"a":{}}'),
    *(b'{"step": 1}', b'{"step": true, "kind": "eval"}', b'{"step": 1, "kind": "start"}'),
    *(b'{"step": 1, "kind": "rebuild"}', b'{"step": 1, "kind": []}', b"0", b'{"": ""}'),
)


def _json(rng: np.random.Generator, values: dict[str, Any]) -> bytes:
    if rng.random() < 0.01:
        return _ODD_JSON[int(rng.integers(len(_ODD_JSON)))]
    changed = dict(values)
    for name in values:
        if rng.random() < 0.01:
            odd = (None, True, [], {}, "x", -1, 1.5, 10**30, [[]], {"a": {}}, "\0", float("nan"))
            changed[name] = odd[int(rng.integers(len(odd)))]
        if rng.random() < 0.005:
            del changed[name]
    return json.dumps(changed).encode()


def _lines(rng: np.random.Generator, reader: str) -> bytes:
    if reader == "metrics.jsonl":
        start = {"step": 0, "kind": "start", "fingerprint": "ab", "versions": {}}
        evals = [{"step": n, "kind": "eval", "loss": 1.0, "accuracy": 0.5} for n in range(1, 5)]
        last = {"step": 5, "kind": "final", "loss": 1.0, "seeds": {"loss": [1.0]}}
        rebuilt = {"step": 2, "kind": "rebuild", "guard_bits": 3, "said": "so"}
        return b"".join(_json(rng, each) + b"\n" for each in (start, *evals, rebuilt, last))
    if reader == "experiment.json":
        return _json(rng, {"config": "configs/vit_digits.py", "scale": "", "overrides": {}})
    if reader == "config.json":
        return _json(rng, _fields())
    vocab = {chr(33 + n): n for n in range(60)} | {'!"': 60, "#$": 61}
    model = {"type": "BPE", "vocab": vocab, "merges": [["!", '"'], ["#", "$"]]}
    return _json(rng, {"version": "1.0", "model": model, "added_tokens": [], "decoder": None})


@functools.cache
def _fields() -> dict[str, Any]:
    from flax.traverse_util import flatten_dict

    from configs import vit_digits

    return flatten_dict(vit_digits.get_config("smoke").to_dict(), sep=".")


def _pickle(rng: np.random.Generator, reader: str, name: str) -> bytes:
    batch: dict[Any, Any]
    fine = reader == "cifar100"
    if "meta" in name:
        kinds = {"fine_label_names": 100, "coarse_label_names": 20} if fine else {"label_names": 10}
        batch = {kind: [f"{kind}{n}" for n in range(count)] for kind, count in kinds.items()}
    else:
        pixels = rng.integers(0, 256, (2, 3072), np.uint8)
        kinds = ("fine_labels", "coarse_labels") if fine else ("labels",)
        batch = {"data": pixels, **{kind: [1, 2] for kind in kinds}}
    if rng.random() < 0.1:
        odd = (
            np.zeros(2),
            np.zeros((2, 3072), "O"),
            1,
            None,
            ["a", []],
            {"b": 2},
            2**70,
            (1, (2,)),
        )
        batch[str(rng.choice([*batch]))] = odd[int(rng.integers(len(odd)))]
    good = pickle.dumps(batch, protocol=2 + int(rng.integers(4)))
    if rng.random() > 0.1:
        return good
    soup = [_HARMFUL[int(rng.integers(len(_HARMFUL)))] for _ in range(int(rng.integers(1, 8)))]
    place = int(rng.integers(2, len(good)))
    return good[:2] + b"".join(soup) + (b"." if rng.random() < 0.5 else good[place:])


def _doubled(kind: bytes) -> bytes:
    """A value that holds the one before twice, thirty times over: 2^30 of them."""
    two = {b"]": b"](%s%se", b"(t": b"(%s%st"}[kind]
    steps = (
        two % (b"h" + bytes([n]), b"h" + bytes([n])) + b"q" + bytes([n + 1]) for n in range(30)
    )
    return kind + b"q\0" + b"".join(steps)


_HARMFUL = (
    *(_doubled(b"]"), _doubled(b"(t"), b"}" + _doubled(b"(t") + b"K\x01s", b"(" * 5000, b"]" * 9),
    *(
        b"cos\nsystem\n(S'exit 7'\ntR",
        b"cposix\n_exit\n(K\x07tR",
        b"cbuiltins\neval\n(X\1\0\0\0ftR",
    ),
    *(b"r\xff\xff\xff\xff", b"r\0\0\0\x7f", b"j\xff\xff\xff\xff", b"\x82\x01", b"P1\n", b"K\x01Q"),
    *(b"B" + struct.pack("<I", 2**32 - 1), b"\x8e" + struct.pack("<Q", 2**62), b"\x97", b"\x98"),
    *(b"\x96" + struct.pack("<Q", 2**40), b"\x95" + struct.pack("<Q", 2**62), b"0", b"2", b"d"),
    b"cnumpy\nndarray\n(K\x01\x85cnumpy\ndtype\nX\1\0\0\0O\x85RB\x08\0\0\0AAAAAAAAtR",
    b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR(K\x01J\xff\xff\xff"
    b"\x7f\x85cnumpy\ndtype\nX\x02\0\0\0u1\x85R\x89C\x01atb",
    *(b"I9" + b"9" * 5000 + b"\n", b"L" + b"9" * 5000 + b"\n", b"\x8b\xff\xff\xff\x7f", b"N}b"),
    *(b"ccollections\nOrderedDict\n)R", b"c__main__\nx\n)\x81", b"i", b"\x93", b"t", b"e", b"u"),
)
