"""Damage to a prepared data set is told with the set, the place and the remedy; never read."""

import re
import shutil

import numpy as np
import pytest

from train.datasets.registry import in_chunks, open_builder, open_split

REMEDY = r"dataset restaurants in .* is damaged.*Make it again elsewhere.*--config\.data_dir=DIR"


@pytest.fixture
def copied(data_dir, tmp_path):
    """(name) -> the folder of a copy of a set."""

    def copy(name="restaurants"):
        whole = open_builder(name, data_dir).data_path
        return shutil.copytree(whole, tmp_path / name / whole.name)

    return copy


def read(copy):
    examples, _ = open_split("restaurants", "test", str(copy.parent.parent))
    return [
        sorted((name, str(value)) for name, value in each.items()) for each in in_chunks(examples)
    ]


def shard(copy):
    (file,) = copy.glob("*-test.array_record*")
    return file


@pytest.mark.claim("damaged data are noticed")
@pytest.mark.parametrize("length", [0, 10, 2**16 - 1, 2**16, 2**16 + 1, -(2**16), -1])
def test_a_truncated_file(copied, length):
    copy = copied()
    shard(copy).write_bytes(shard(copy).read_bytes()[:length])
    with pytest.raises(ValueError, match=REMEDY):
        read(copy)


@pytest.mark.claim("damaged data are noticed")
@pytest.mark.control("damaged data are noticed")
def test_flipped_bits_change_nothing_unseen(copied):
    copy = copied()
    good, data = read(copy), shard(copy).read_bytes()
    assert len(good) > 10  # what is whole is read
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


def test_what_is_wrong_is_named(copied):
    copy = copied()
    data = bytearray(shard(copy).read_bytes())
    info, count = copy / "dataset_info.json", len(read(copy))
    info.write_text(info.read_text().replace(f'"{count}"', f'"{count + 1}"'))
    with pytest.raises(ValueError, match=rf"has {count} records, {count + 1} were written"):
        read(copy)
    info.write_text(info.read_text().replace(f'"{count + 1}"', f'"{count}"'))
    data[200] ^= 1
    shard(copy).write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged: record 0 of split test \("):
        read(copy)
    shard(copy).unlink()
    with pytest.raises(ValueError, match=r"test\.array_record.* is missing"):
        read(copy)


@pytest.mark.parametrize("content", [b"", b'{"name": ', b"\xff", b"[]"])
def test_a_damaged_description(copied, content):
    copy = copied()
    (copy / "dataset_info.json").write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=r"dataset restaurants|is damaged"):
        read(copy)


def test_an_image_that_is_none(copied, monkeypatch):
    examples, _ = open_split("digits", "validation", str(copied("digits").parent.parent))
    records = type(examples.data_source)
    real = records.__getitems__

    def broken(self, keys):
        found = zip(keys, real(self, keys), strict=True)
        return [each.replace(b"PNG", b"GIF") if key == 7 else each for key, each in found]

    monkeypatch.setattr(records, "__getitems__", broken)
    with pytest.raises(ValueError, match=r"digits .* damaged: record 7 of split validation"):
        list(in_chunks(examples))
