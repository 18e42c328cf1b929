"""Data sets of our own: bundled ones, splits, how files are parsed, and the registry."""

import io
import json
import pickle
import sys
from collections import Counter
from typing import ClassVar

import numpy as np
import pytest
from toy_files import cifar_files, kaggle_csv, plays

from train.datasets import registry
from train.datasets.cifar import Cifar10, load_arrays
from train.datasets.kaggle_enfr import KaggleEnfr, split_key
from train.datasets.local_file import read_csv
from train.datasets.numbers_enfr import english, french
from train.datasets.openwebtext_sample import OpenwebtextSample
from train.datasets.pydoc import Pydoc
from train.datasets.registry import BUNDLED, LOCAL, footnote, in_chunks, open_builder, open_split
from train.datasets.splits import bucket, connected
from train.datasets.tinyshakespeare import Tinyshakespeare


def read(builder, split):
    return [
        {key: value.decode() for key, value in example.items()}
        for example in builder.as_data_source(split)
    ]


# --- bundled sets --------------------------------------------------------------------

# where French and English spelling turn
SPELLING = """
0: zero, zéro
17: seventeen, dix-sept
21: twenty-one, vingt et un
70: seventy, soixante-dix
71: seventy-one, soixante et onze
77: seventy-seven, soixante-dix-sept
80: eighty, quatre-vingts
81: eighty-one, quatre-vingt-un
91: ninety-one, quatre-vingt-onze
180: one hundred and eighty, cent quatre-vingts
200: two hundred, deux cents
201: two hundred and one, deux cent un
1100: one thousand one hundred, mille cent
2071: two thousand and seventy-one, deux mille soixante et onze
4200: four thousand two hundred, quatre mille deux cents
"""


@pytest.mark.parametrize("line", SPELLING.strip().splitlines())
def test_numbers_in_words(line):
    number, words = line.split(": ")
    assert f"{english(int(number))}, {french(int(number))}" == words


def test_every_number_has_its_own_words():
    for spell in (english, french):
        assert len({spell(number) for number in range(10_000)}) == 10_000
        for bad in (-1, 10_000):
            with pytest.raises(ValueError, match=f"number is {bad}, expected 0..9999"):
                spell(bad)


def test_numbers_enfr_is_split_once(data_dir):
    builder = open_builder("numbers_enfr", data_dir)
    splits = {split: read(builder, split) for split in ("train", "validation", "test")}
    pairs = Counter((e["english"], e["french"]) for part in splits.values() for e in part)
    assert pairs == Counter((english(n), french(n)) for n in range(10_000))
    assert 400 < len(splits["validation"]) < 600 and 400 < len(splits["test"]) < 600
    assert "tensorflow" not in sys.modules and footnote(builder) is None


def long_lines(texts):
    return {line.strip() for t in texts for line in t.splitlines() if len(line.strip()) >= 40}


@pytest.mark.claim("no line in two splits")
@pytest.mark.control("no line in two splits")
def test_pydoc_is_the_language_reference(data_dir):
    from pydoc_data.topics import topics

    builder = open_builder("pydoc", data_dir)
    train, validation = ([e["text"] for e in read(builder, s)] for s in ("train", "validation"))
    assert sorted(train + validation) == sorted(topics.values())
    assert len(validation) >= 3 and len(train) > 0.6 * len(topics)
    size = sum(map(len, validation)) / sum(map(len, topics.values()))
    assert 0.04 < size < 0.2
    assert not long_lines(train) & long_lines(validation)
    # every tenth topic, as in version 1.0.0, leaks
    ordered = [topics[name] for name in sorted(topics)]
    kept = long_lines(text for index, text in enumerate(ordered) if index % 10 != 9)
    assert len(long_lines(ordered[9::10]) & kept) > 30
    assert open_builder("pydoc", data_dir).is_prepared()  # the second time from disk


def test_connected_items_are_one_group():
    keys = [{"a"}, {"b"}, {"a", "c"}, (), {"c", "d"}, {"e"}, ["d", "b"]]
    assert connected(keys) == [[0, 1, 2, 4, 6], [3], [5]]
    assert connected(keys[:-1]) == [[0, 2, 4], [1], [3], [5]]
    # a long chain, in bad order
    chain = [(n, n + 1) for n in range(3000)]
    assert connected(chain[1::2] + chain[::2]) == [list(range(3000))]


def test_two_processes_may_prepare_at_once(tmp_path, monkeypatch):
    write = registry.write

    def overtaken(builder):
        write(Pydoc(data_dir=str(tmp_path), file_format="array_record"))
        raise OSError("Directory not empty")

    monkeypatch.setattr(registry, "write", overtaken)
    assert len(open_builder("pydoc", str(tmp_path)).as_data_source("validation")) > 0


def test_every_builder_says_what_it_is():
    for name, builder in (BUNDLED | LOCAL).items():
        assert "Source: " in builder.__doc__ and "Licence: " in builder.__doc__, builder
        assert builder.name == name


# --- parsing -------------------------------------------------------------------------


def kaggle(rows):
    return KaggleEnfr.parse({"eng_-french.csv": kaggle_csv(rows)})


@pytest.mark.claim("no sentence in two splits")
@pytest.mark.control("no sentence in two splits")
def test_no_sentence_of_either_language_is_in_two_splits():
    # two English sides a French one, and a second French one that links to the first
    rows = []
    for n in range(500):
        rows += [(f"I'm {n}.", f"Je suis {n}."), (f"I am {n}!", f"Je suis {n} !")]
        rows += [(f"I am {n}.", f"C'est moi {n}.")]
    splits = kaggle(rows)
    for side, count in (("english", 1000), ("french", 1000)):
        keys = [{split_key(e[side]) for e in part} for part in splits.values()]
        assert sum(map(len, keys)) == len(set.union(*keys)) == count
    assert all(len(part) % 3 == 0 and len(part) > 6 for part in splits.values())
    # by the English side alone the French one, and by the text as it stands the English one,
    # would have been in two of them
    for key, two in ((split_key, ("I'm {}", "I am {}")), (str, ("I am {}.", "I am {}!"))):
        places = [[bucket(key(text.format(n)), 50) >= 48 for text in two] for n in range(500)]
        assert any(one != other for one, other in places)
    again = kaggle(rows[::-1])  # the rows' order changes nothing
    for name, part in splits.items():
        assert sorted(map(str, again[name])) == sorted(map(str, part))


def test_a_word_of_both_languages_links_nothing():
    rows = [(f"{n}.", f"{n + 1}.") for n in range(500)]  # a chain, if the sides were mixed
    assert all(len(part) > 1 for part in kaggle(rows).values())
    assert split_key("Don't RUN!") == split_key("dont run") == "dontrun"
    assert split_key("...") == "..." and split_key("Ça") == "ça"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"en,fr\r\nHi,Salut\r\n", r"f.csv: columns are \['en', 'fr'\], expected \['a', 'b'\]"),
        (b"a,b\r\nHi,Salut\r\nRun\r\n", r"f.csv, line 3: 1 columns \['Run'\], expected 2"),
        (b"a,b\r\nHi,\r\n", r"f.csv, line 2: 2 columns \['Hi', ''\], .* none of them empty"),
        (b'a,b\r\nHi,"Salut', r"f.csv, line 2: unexpected end of data"),
        (b"a,b\r\nHi,Fran\xe7ais\r\n", r"f.csv, line 2: not UTF-8 text"),
    ],
)
def test_bad_csv_names_the_line(content, message):
    with pytest.raises(ValueError, match=message):
        read_csv("f.csv", content, ["a", "b"])
    quoted = '\ufeffa,b\n"x, y","1\n2"\n'.encode()  # with a byte order mark
    assert read_csv("f.csv", quoted, ["a", "b"]) == [["x, y", "1\n2"]]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": "cut of', "line 2: not JSON"),
        ('{"body": "x"}', 'line 2: expected an object with a string "text"'),
        ('{"text": 3}', 'line 2: expected an object with a string "text"'),
        ('{"text": "\\ud800"}', "line 2: .*surrogates not allowed"),
    ],
)
def test_bad_jsonl_names_the_line(line, message):
    with pytest.raises(ValueError, match=message):
        OpenwebtextSample.parse({"f.jsonl": f'{{"text": "fine"}}\n{line}\n'.encode()})
    unusual = '{"text": "a\u2028b", "id": 1}\n\n'.encode()  # a line end that JSON does not know
    splits = OpenwebtextSample.parse({"f.jsonl": unusual})
    assert [e["text"] for part in splits.values() for e in part] == ["a\u2028b"]


def test_shakespeare_is_cut_between_speeches_and_its_last_tenth_held_out():
    text = plays().decode()
    splits = Tinyshakespeare.parse({"input.txt": plays()})
    documents = [example["text"] for part in splits.values() for example in part]
    assert "".join(documents).replace("\n", "") == text.replace("\n", "")
    assert all(each.startswith("ROMEO ") and each.endswith(". \n\n") for each in documents)
    assert all(len(each) >= 4_000 for each in documents[:2])
    held_out = "".join(example["text"] for example in splits["validation"])
    assert 0.1 <= len(held_out) / len(text) < 0.2
    with pytest.raises(ValueError, match="line 1: not UTF-8"):
        Tinyshakespeare.parse({"input.txt": b"\xff"})


# --- CIFAR's pickles -----------------------------------------------------------------


class Python2Pickler(pickle._Pickler):
    """Writes str and bytes as Python 2 wrote its strings, as in the Toronto files."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, text):
        data = text if isinstance(text, bytes) else text.encode("latin1")
        self.write(pickle.BINSTRING + len(data).to_bytes(4, "little") + data)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_string


def python2_pickle(value):
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


@pytest.mark.parametrize("dump", [python2_pickle, lambda value: pickle.dumps(value, protocol=2)])
def test_cifar_pickles_are_read(dump):
    data = np.arange(2 * 3072).astype(np.uint8).reshape(2, 3072)
    batch = load_arrays("batch", dump({b"data": data, b"labels": [3, 9], b"filenames": [b"x"]}))
    assert batch["data"].dtype == np.uint8 and (batch["data"] == data).all()
    assert batch["labels"] == [3, 9] and batch["filenames"] == [b"x"]


class Evil:
    def __reduce__(self):
        return (print, ("this ran",))


@pytest.mark.claim("pickles run no code")
@pytest.mark.control("pickles run no code")
@pytest.mark.parametrize("protocol", [2, 4])
def test_cifar_pickles_run_no_code(capsys, protocol):
    content = pickle.dumps({"data": Evil()}, protocol=protocol)
    with pytest.raises(ValueError, match=r"batch is not a batch .* builtins.print"):
        load_arrays("batch", content.replace(b"__builtin__", b"builtins"))
    assert capsys.readouterr().out == ""
    pickle.loads(content)  # it would have
    assert capsys.readouterr().out == "this ran\n"


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"data": [1, 2]}, "data_batch_1 has no array 'data'; its keys are"),
        ({"data": np.zeros((2, 3072))}, "not a batch of CIFAR images .* not of dtype uint8"),
        ({"data": np.zeros((2, 100), np.uint8)}, r"200 bytes, expected shape \[N, 3072\]"),
        ({"labels": [0]}, "data_batch_1 has 1 labels for 2 images"),
        ({"labels": [0, 10]}, r"labels are not all in 0\.\.9"),
        ({"labels": None}, "data_batch_1 has no list 'labels'; its keys are"),
    ],
)
def test_bad_cifar_batch(changed, message):
    files = {path.split("/")[1]: content for path, content in cifar_files("cifar10").items()}
    assert len(Cifar10.parse(files)["train"]) == 10
    batch = pickle.loads(files["data_batch_1"]) | changed
    with pytest.raises(ValueError, match=message):
        Cifar10.parse(files | {"data_batch_1": pickle.dumps(batch)})


def test_bad_cifar_names_and_damaged_pickles():
    with pytest.raises(ValueError, match="label_names has 1 entries, expected 10 different"):
        Cifar10.label_names({"batches.meta": pickle.dumps({"label_names": ["cat"]})})
    for content in (b"", b"no pickle", pickle.dumps([1, 2]), pickle.dumps({"data": 1})[:-3]):
        with pytest.raises(ValueError, match="test_batch is not a batch of CIFAR images"):
            load_arrays("test_batch", content)


# --- the registry --------------------------------------------------------------------


@pytest.mark.parametrize("name", [*LOCAL, "mnist"])
def test_an_unprepared_set_names_the_command(tmp_path, name):
    with pytest.raises(FileNotFoundError) as error:
        open_builder(name, str(tmp_path))
    message, is_stock = str(error.value), name.startswith("cifar") or name == "mnist"
    stock = f"tfds build {name} --file_format=array_record --data_dir={tmp_path}\n"
    assert (stock in message) == is_stock
    local = f"python -m train.prepare {name} --from FILE --data_dir={tmp_path}\n"
    assert (local in message) == (name in LOCAL)
    assert name not in LOCAL or LOCAL[name].KNOWN.url in message


def test_unknown_set_lists_the_choices(tmp_path):
    choices = ", ".join([*BUNDLED, *LOCAL])
    assert choices.startswith("digits, pydoc, numbers_enfr, restaurants, kaggle_enfr")
    with pytest.raises(ValueError, match=f"dataset is 'no_such_set', expected one of {choices}"):
        open_builder("no_such_set", str(tmp_path))


def test_another_file_format_names_the_folder_and_the_remedy(tmp_path, monkeypatch):
    open_builder("digits", str(tmp_path))
    [info] = tmp_path.rglob("dataset_info.json")
    content = json.loads(info.read_text())
    info.write_text(json.dumps(content | {"fileFormat": "tfrecord"}))
    ways = ["prepares itself in any other folder: name one with --config.data_dir=DIR"]
    ways.append("tfds build digits --file_format=array_record --data_dir=ANOTHER_DIR\n")
    for way in ways:  # the second time as a stock set
        with pytest.raises(FileNotFoundError) as error:
            open_builder("digits", str(tmp_path))
        said = f"digits in {tmp_path}/digits/1.0.0 is in the format tfrecord, expected array_record"
        assert said in str(error.value) and way in str(error.value)
        monkeypatch.setattr(registry, "BUNDLED", {})


def test_open_split_says_what_is_wrong(data_dir):
    examples, builder = open_split("digits", "validation[:5]", data_dir, "image", "label")
    assert len(examples) == 5 and examples[0]["image"].shape == (8, 8, 1)
    assert builder.info.features["label"].num_classes == 10
    for name, features, message in [
        ("pydoc", ("image", "label"), "feature image, label; it has text: .* of image and label"),
        ("digits", ("label", "french"), "feature french; it has image, label"),
    ]:
        with pytest.raises(ValueError, match=f"{name} has no {message}"):
            open_split(name, "train", data_dir, *features)
    for split in ("train[:0]", "train[:0%]", "train[9:5]"):
        with pytest.raises(ValueError, match=r"^split 'train.*' of digits is empty; take a larger"):
            open_split("digits", split, data_dir)
    for split, reason in [("dev", "Unknown split 'dev'"), ("train[:9999]", "with 1438 examples")]:
        with pytest.raises(ValueError, match=r"has no split .*; it has train, valid") as error:
            open_split("digits", split, data_dir)
        assert reason in str(error.value)


@pytest.mark.parametrize("size", [1, 7, 20, 4096])
def test_chunks_are_the_examples_in_order(data_dir, size):
    examples, _ = open_split("numbers_enfr", "test[:20]", data_dir)
    assert list(in_chunks(examples, size)) == [examples[index] for index in range(20)]
