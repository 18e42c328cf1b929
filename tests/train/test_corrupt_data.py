"""Damage to a prepared data set is told with the set, the place and the remedy; never read."""

import re
import shutil

import numpy as np
import pytest

from train.datasets.registry import in_chunks, open_builder, open_split

REMEDY = r"dataset restaurants in .* is damaged.*Make it again elsewhere.*--config\.data_dir=DIR"


@pytest.fixture(scope="module")
def whole(data_dir):
    return open_builder("restaurants", data_dir).data_path


@pytest.fixture
def copy(whole, tmp_path):
    """The folder of a copy of the set."""
    return shutil.copytree(whole, tmp_path / "restaurants" / whole.name)


def read(copy):
    examples, _ = open_split("restaurants", "test", str(copy.parent.parent))
    return [
        sorted((name, str(value)) for name, value in each.items()) for each in in_chunks(examples)
    ]


def shard(copy):
    (file,) = copy.glob("*-test.array_record*")
    return file


def test_control_what_is_whole_is_read(copy):
    assert len(read(copy)) > 10


@pytest.mark.parametrize("length", [0, 10, 2**16 - 1, 2**16, 2**16 + 1, -(2**16), -1])
def test_a_truncated_file(copy, length):
    data = shard(copy).read_bytes()
    shard(copy).write_bytes(data[:length])
    with pytest.raises(ValueError, match=REMEDY):
        read(copy)


def test_flipped_bits_change_nothing_unseen(copy):
    good, data = read(copy), shard(copy).read_bytes()
    places = np.nonzero(np.frombuffer(data, np.uint8))[0]  # the rest is padding
    rng, seen = np.random.default_rng(0), 0
    for place in [*rng.choice(places, 30), *places[-20:]]:  # records, and the index at the end
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        shard(copy).write_bytes(flipped)
        try:
            assert read(copy) == good
        except ValueError as error:
            seen += 1
            assert re.match(REMEDY, str(error), re.DOTALL), error
    assert seen >= 25


def test_the_record_is_named(copy):
    data = bytearray(shard(copy).read_bytes())
    data[200] ^= 1
    shard(copy).write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged: record 0 of split test \("):
        read(copy)


def test_a_missing_file(copy):
    shard(copy).unlink()
    with pytest.raises(ValueError, match=r"test\.array_record.* is missing"):
        read(copy)


def test_fewer_records_than_were_written(copy):
    file, count = copy / "dataset_info.json", len(read(copy))
    file.write_text(file.read_text().replace(f'"{count}"', f'"{count + 1}"'))
    with pytest.raises(ValueError, match=rf"has {count} records, {count + 1} were written"):
        read(copy)


@pytest.mark.parametrize("content", [b"", b'{"name": ', b"\xff", b"[]"])
def test_a_damaged_description(copy, content):
    (copy / "dataset_info.json").write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=r"dataset restaurants|is damaged"):
        read(copy)


def test_an_image_that_is_none(data_dir, tmp_path, monkeypatch):
    whole = open_builder("digits", data_dir).data_path
    folder = shutil.copytree(whole, tmp_path / "digits" / whole.name)
    examples, _ = open_split("digits", "validation", str(folder.parent.parent))
    records = examples.data_source
    real = type(records).__getitems__

    def broken(self, keys):
        return [
            b.replace(b"PNG", b"GIF") if key == 7 else b
            for key, b in zip(keys, real(self, keys), strict=True)
        ]

    monkeypatch.setattr(type(records), "__getitems__", broken)
    with pytest.raises(ValueError, match=r"digits .* damaged: record 7 of split validation"):
        list(in_chunks(examples))
