"""Files that mean harm: what a download asks for is not done, and what is too much is refused."""

import bz2
import gzip
import io
import lzma
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
from toy_files import download, jsonl, kaggle_csv, tar_of, zip_of

from train.datasets.archive import read_files
from train.datasets.cifar import load_arrays
from train.datasets.registry import LOCAL, open_builder
from train.prepare import read_source

COMPRESSORS = [bytes, gzip.compress, lzma.compress, bz2.compress]
NDARRAY = b"cnumpy\nndarray\n(K\x01\x85cnumpy\ndtype\nX\1\0\0\0O\x85RB\x08\0\0\0AAAAAAAAtR"
TWICE = b"".join(b"(h%ch%ctq%c" % (n, n, n + 1) for n in range(40))


@pytest.mark.claim("a downloaded file cannot run code, crash, fill the memory or hang")
@pytest.mark.parametrize(
    "value, message",
    [
        (b"cos\nsystem\n(X\x06\0\0\0exit 7tR", "it asks for os.system, which no CIFAR file does"),
        (NDARRAY, "it asks for numpy.ndarray"),
        (b"c__builtin__\neval\n(X\1\0\0\0ftR", "it asks for __builtin__.eval"),
        (b"(tq\0" + TWICE, "a key that is no string"),
        (b"K\x01s}(tq\0" + TWICE + b"K\x01s", "a key that is no string"),
        (b"]q\0(h\0h\0e", "has no array 'data'"),  # a list in itself
        (b"r\xff\xff\xff\xff", "has no array|ValueError|IndexError|TypeError|AttributeError"),
        (b"B\xff\xff\xff\xff", "EOFError|truncated"),
        (b"\x96\0\0\0\0\0\1\0\0", "KeyError"),  # an array of a tebibyte
        (b"\x82\x01", "KeyError"),  # of copyreg
        (b"K\x01K\x02b", "a state without an object"),
    ],
)
def test_a_pickle_is_read_without_doing_what_it_asks_for(value, message):
    content = b"\x80\x02}X\x04\0\0\0data" + value + b"s."
    with pytest.raises(ValueError, match=message) as error:
        list(LOCAL["cifar10"]._parse_batch("data_batch_1", content))
    assert len(str(error.value)) < 500


@pytest.mark.control("a downloaded file cannot run code, crash, fill the memory or hang")
def test_pythons_own_reader_does_what_a_pickle_asks_for():
    content = b"\x80\x02}X\x04\0\0\0datacoperator\nadd\n(K\x01K\x02tRs."
    assert pickle.loads(content) == {"data": 3}
    with pytest.raises(ValueError, match=r"it asks for operator\.add"):
        load_arrays("data_batch_1", content)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_arrays_of_any_protocol_and_order_are_read(protocol):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3072), np.uint8)
    for array in (pixels, np.asfortranarray(pixels)):
        read = load_arrays("b", pickle.dumps({b"data": array, "n": [1, "a"]}, protocol=protocol))
        assert (read["data"] == pixels).all() and read["n"] == [1, "a"]
    for other in (pixels.astype(np.int16), pixels[:, :9], pixels[0], pixels.astype("O")):
        with pytest.raises(ValueError, match="is not a batch of CIFAR images"):
            load_arrays("b", pickle.dumps({"data": other}, protocol=protocol))


def test_a_hash_that_is_not_the_known_one_comes_before_all_else(tmp_path, monkeypatch):
    monkeypatch.setattr(LOCAL["cifar10"], "parse", lambda _: pytest.fail("looked into it"))
    with pytest.raises(ValueError, match="the md5 of data_batch_1"):
        read_source("cifar10", download(tmp_path, "cifar10"))


ZEROS = bytes(2**20)


@pytest.mark.claim("a downloaded file cannot run code, crash, fill the memory or hang")
@pytest.mark.parametrize(
    "bomb",
    [
        *(each(ZEROS) * 3 for each in COMPRESSORS),
        zip_of({"a.csv": ZEROS * 3}),
        zip_of({"1/x.csv": ZEROS, "2/x.csv": ZEROS, "3/x.csv": ZEROS}),
        gzip.compress(tar_of({"other": ZEROS * 3, "a.csv": b""})),
        tar_of({"a.csv": ZEROS * 3}),
        zip_of({f"{n}.txt": b"" for n in range(30)}),
        bz2.compress(tar_of({f"{n}.txt": b"" for n in range(30)})),
    ],
)
def test_more_than_the_limit_is_refused(tmp_path, monkeypatch, bomb):
    monkeypatch.setattr("train.datasets.archive.MAX_BYTES", 2**21)
    monkeypatch.setattr("train.datasets.archive.MAX_FILES", 20)
    (tmp_path / "x").write_bytes(bomb)
    with pytest.raises(ValueError, match=r"x holds more than (2 MiB|20 files), the most that is"):
        read_files(tmp_path / "x", ["a.csv"])
    (tmp_path / "x").write_bytes(gzip.compress(ZEROS * 2))  # the limit itself is not
    assert len(read_files(tmp_path / "x", ["a.csv"])["a.csv"]) == 2**21


def test_links_and_unlimited_methods_of_an_archive_are_not_followed(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("a.csv")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    (tmp_path / "x").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=r"no files for a\.csv, expected one; it holds nothing"):
        read_files(tmp_path / "x", ["a.csv"])
    with zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.csv", b"")
    with pytest.raises(ValueError, match="compressed by method 12, expected deflate"):
        read_files(tmp_path / "x", ["a.csv"])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        read_files(tmp_path / "pipe", ["a.csv"])


@pytest.mark.parametrize("line", [b"[" * 100_000, b"9" * 5000, b'{"a":' * 100_000])
def test_json_that_python_does_not_read_is_named(line):
    with pytest.raises(ValueError, match="line 1: not JSON"):
        LOCAL["openwebtext_sample"].parse({"x.jsonl": line})


def test_more_lines_than_the_limit_are_refused(monkeypatch):
    monkeypatch.setattr("train.datasets.local_file.MAX_LINES", 50)
    for name, content in (("openwebtext_sample", jsonl()), ("kaggle_enfr", kaggle_csv())):
        with pytest.raises(ValueError, match="x has more than 50 lines, the most that is read"):
            LOCAL[name].parse({"x": content})


@pytest.mark.parametrize("name", ["huggingface:glue", "kaggle:some/config"])
def test_sets_read_from_the_network_are_refused_without_it(tmp_path, name, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    with pytest.raises(ValueError, match=f"dataset is '{name}': .* read from the network"):
        open_builder(name, str(tmp_path))
