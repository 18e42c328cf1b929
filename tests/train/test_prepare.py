"""`python -m train.prepare`: small made-up files in, prepared sets or a precise error out."""

import bz2
import errno
import gzip
import hashlib
import json
import lzma
import re

import numpy as np
import pytest
import tensorflow_datasets as tfds
from toy_files import IMAGES, cifar_files, download, e2e_files, jsonl, kaggle_csv, tar_of, zip_of

from train.datasets.archive import read_files
from train.datasets.kaggle_enfr import KaggleEnfr
from train.datasets.registry import LOCAL, footnote, open_builder
from train.prepare import main

# --- files out of what was downloaded ------------------------------------------------

# incompressible, so that cutting a file cuts its content
NOISE = np.random.default_rng(0).bytes(5000)
TWO = {"folder/a.csv": NOISE, "folder/deep/b.csv": b"b", "README": b"r"}
COMPRESSORS = [bytes, gzip.compress, lzma.compress, bz2.compress]


@pytest.mark.parametrize("packed", [zip_of(TWO), *(each(tar_of(TWO)) for each in COMPRESSORS)])
def test_files_come_out_of_any_archive(tmp_path, packed):
    path = tmp_path / "download"
    path.write_bytes(packed)
    found = read_files(path, ["b.csv", "a.csv"])
    assert list(found.items()) == [("b.csv", b"b"), ("a.csv", NOISE)]
    path.write_bytes(packed[:3000])
    with pytest.raises(ValueError, match="download is truncated or damaged, download it again"):
        read_files(path, ["b.csv", "a.csv"])


@pytest.mark.parametrize("compress", COMPRESSORS)
def test_a_lone_file_comes_under_any_name(tmp_path, compress):
    for path, content in [("x.bin", compress(NOISE)), ("x.zip", zip_of({"other.csv": NOISE}))]:
        (tmp_path / path).write_bytes(content)
        assert read_files(tmp_path / path, ["a.csv"]) == {"a.csv": NOISE}
    if compress is not bytes:
        (tmp_path / "x.bin").write_bytes(compress(NOISE)[:3000])
        with pytest.raises(ValueError, match="truncated or damaged"):
            read_files(tmp_path / "x.bin", ["a.csv"])


def test_files_come_out_of_a_folder(tmp_path):
    for name, content in TWO.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert read_files(tmp_path, ["a.csv", "b.csv"]) == {"a.csv": NOISE, "b.csv": b"b"}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "x is empty, download it again"),
        (b"mr,ref\n", "x has no files for a.csv, expected one; it holds x"),
        (zip_of({"c.csv": b"", "a.csv": b""}), "no files for b.csv, expected one; .* a.csv, c.csv"),
        (tar_of({"1/b.csv": b"", "2/b.csv": b"", "a.csv": b""}), "2 files for b.csv, expected one"),
    ],
)
def test_wrong_archive_says_what_it_holds(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_files(tmp_path / "x", ["a.csv", "b.csv"])


def test_a_file_of_the_system_that_cannot_be_read_is_not_damaged(tmp_path, monkeypatch):
    path = download(tmp_path, "e2e")

    def refused(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refused)
    with pytest.raises(PermissionError):
        read_files(path, ["devset.csv"])


# --- sets out of files ---------------------------------------------------------------


def run(name, path, data_dir, *options):
    main([name, "--from", str(path), "--data_dir", str(data_dir), *options])


@pytest.fixture
def fails(tmp_path, capsys):
    """Runs what has to fail; returns the error. Nothing may be left behind."""

    def run_it(name, path, *options):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as error:
            run(name, path, tmp_path / "tfds", *options)
        assert sorted(tmp_path.rglob("*")) == before
        assert capsys.readouterr().out == ""
        message = error.value.code  # a str: printed to stderr, exit status 1
        assert isinstance(message, str) and message.startswith("error: ")
        return message

    return run_it


COUNTS = {"kaggle_enfr": 400, "openwebtext_sample": 60, "tinyshakespeare": 4, "e2e": 10}
COUNTS |= {"cifar10": 14, "cifar100": 14}


@pytest.mark.parametrize("name", list(LOCAL))
def test_every_set_is_prepared_and_footnoted(tmp_path, capsys, fails, name):
    path, data_dir = download(tmp_path, name), tmp_path / "tfds"
    message = fails(name, path)  # not the known file
    assert "(uncompressed) is" in message and "--unverified" in message
    run(name, path, data_dir, "--unverified")
    out = capsys.readouterr().out
    builder = open_builder(name, str(data_dir))
    found = {split: info.num_examples for split, info in builder.info.splits.items()}
    assert set(found) == set(LOCAL[name].KNOWN.counts)
    assert sum(found.values()) == COUNTS[name]
    for split, count in found.items():
        assert f"{split:<12}{count:>9,}" in out and len(builder.as_data_source(split)) == count
    note = footnote(builder)
    assert note is not None and note.startswith(f"prepared from {path.name} (sha256 ")
    assert note.endswith(", unverified)") and "unverified." in out
    assert sorted(p.name for p in data_dir.iterdir()) == [name]  # no downloads folder
    config = {"kaggle_enfr": "translation_enfr", "cifar10": "vit_cifar10"}.get(name, "")
    command = f"python -m train --config=configs/{config}.py --workdir=runs/{config}"
    assert not config or f"{command} --config.data_dir={data_dir}" in out


@pytest.mark.parametrize("name, classes", [("cifar10", 10), ("cifar100", 100)])
def test_stock_builder_reads_cifar(tmp_path, name, classes):
    run(name, download(tmp_path, name), tmp_path / "tfds", "--unverified")
    builder = tfds.builder(name, data_dir=str(tmp_path / "tfds"), file_format="array_record")
    assert builder.is_prepared() and type(builder) is not LOCAL[name]
    stock = tfds.builder(name, data_dir=str(tmp_path / "none")).info.features
    features = LOCAL[name](data_dir=str(tmp_path / "none")).info.features
    assert list(features) == list(stock)
    for feature in stock:
        assert features[feature].get_tensor_info() == stock[feature].get_tensor_info()
    label = builder.info.features["label"]
    assert label.num_classes == classes and label.names[0] in ("a0", "f0")
    for split, numbers in [("train", range(10)), ("test", range(10, 14))]:
        examples = {e["id"].decode(): e for e in builder.as_data_source(split)}
        for index, number in enumerate(numbers):
            example = examples[f"{split}_{index:05d}"]
            assert (example["image"] == IMAGES[number]).all()
            assert example["label"] == number % classes
            assert name == "cifar10" or example["coarse_label"] == number % 20


def test_splits_are_kept_and_the_order_is_another(tmp_path):
    for name in ("e2e", "kaggle_enfr"):
        run(name, download(tmp_path, name), tmp_path / "tfds", "--unverified")
    source = open_builder("e2e", str(tmp_path / "tfds")).as_data_source("validation")
    pairs = sorted((e["meaning_representation"], e["reference"]) for e in source)
    assert pairs == [(b"name[devset.csv %d]" % n, b"It is %d." % n) for n in range(3)]
    source = open_builder("kaggle_enfr", str(tmp_path / "tfds")).as_data_source("train")
    numbers = [int(e["english"].decode().strip("Number .")) for e in source]
    assert numbers != sorted(numbers) and len(set(numbers)) == len(numbers) > 300


@pytest.fixture
def known_kaggle(monkeypatch):
    """As if the small csv were the known file."""
    counts = {k: len(v) for k, v in KaggleEnfr.parse({"f.csv": kaggle_csv()}).items()}
    files = {"eng_-french.csv": hashlib.sha256(kaggle_csv()).hexdigest()}
    known = KaggleEnfr.KNOWN._replace(files=files, counts=counts)
    monkeypatch.setattr(KaggleEnfr, "KNOWN", known)


@pytest.mark.parametrize(
    "content, options",
    [
        (kaggle_csv(), ()),
        (lzma.compress(kaggle_csv()), ()),
        (zip_of({"x/eng_-french.csv": kaggle_csv()}), ("--unverified",)),
    ],
)
def test_the_known_content_is_verified_in_any_form(tmp_path, known_kaggle, content, options):
    (tmp_path / "file").write_bytes(content)
    run("kaggle_enfr", tmp_path / "file", tmp_path / "tfds", *options)
    builder = open_builder("kaggle_enfr", str(tmp_path / "tfds"))
    assert footnote(builder) is None
    assert ", verified." in (builder.data_path / "dataset_info.json").read_text()


@pytest.mark.claim("another file is noticed")
@pytest.mark.control("another file is noticed")
def test_one_changed_letter_or_a_missing_line_is_found(tmp_path, fails, known_kaggle):
    path = tmp_path / "eng_-french.csv"
    path.write_bytes(kaggle_csv().replace(b"Number 7.", b"Number 7!"))
    message = fails("kaggle_enfr", path)
    assert "sha256 of eng_-french.csv (uncompressed) is" in message
    assert f"expected {KaggleEnfr.KNOWN.files['eng_-french.csv']}" in message
    path.write_bytes(kaggle_csv().rsplit(b"\r\n", 1)[0])
    message = fails("kaggle_enfr", path)
    assert "sha256 of eng_-french.csv (uncompressed) is" in message
    path.write_bytes(kaggle_csv())
    run("kaggle_enfr", path, tmp_path / "tfds")


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "openwebtext_sample",
            kaggle_csv(),
            r"is not what openwebtext_sample is made from: .* 1: ",
        ),
        ("openwebtext_sample", jsonl()[:15], "line 1: not JSON"),
        ("openwebtext_sample", b'{"text": "only one"}\n', "has no examples for validation"),
        ("openwebtext_sample", lzma.compress(jsonl())[:-20], "truncated or damaged"),
        ("kaggle_enfr", jsonl(), "columns are"),
        ("e2e", b"", "is empty"),
        ("e2e", jsonl(), "no files for trainset.csv, expected one"),
        ("cifar10", tar_of(cifar_files("cifar100")), "for data_batch_1.*folder/meta, folder/test"),
        (
            "e3e",
            tar_of(e2e_files()),
            "NAME is 'e3e', expected one of kaggle_enfr, openwebtext_sample",
        ),
        ("digits", b"", "digits needs no file: it prepares itself"),
    ],
)
def test_bad_files_leave_nothing_behind(tmp_path, fails, name, content, message):
    (tmp_path / "file").write_bytes(content)
    said = fails(name, tmp_path / "file", "--unverified")
    assert re.search(message, said)


def test_a_missing_file_names_where_it_is_downloaded(tmp_path, fails):
    assert "no does not exist; download e2e from https" in fails("e2e", tmp_path / "no")


def test_an_interrupted_write_leaves_nothing_behind(tmp_path, monkeypatch):
    cifar10 = LOCAL["cifar10"]
    path, data_dir = download(tmp_path, "cifar10"), tmp_path / "new" / "tfds"
    original = cifar10._generate_examples

    def disk_full(self, split, examples):
        for count, example in enumerate(original(self, split, examples)):
            if count == 3:
                assert list(data_dir.rglob("*incomplete*"))  # it was really writing
                raise OSError("No space left on device")
            yield example

    monkeypatch.setattr(cifar10, "_generate_examples", disk_full)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=r"error: .*No space left on device"):
        run("cifar10", path, data_dir, "--unverified")
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.undo()
    run("cifar10", path, data_dir, "--unverified")
    assert open_builder("cifar10", str(data_dir)).is_prepared()


def test_again_from_the_same_file_is_fine_from_another_not(tmp_path, capsys, fails):
    path, data_dir = tmp_path / "pages.jsonl", tmp_path / "tfds"
    path.write_bytes(jsonl())
    run("openwebtext_sample", path, data_dir, "--unverified")
    run("openwebtext_sample", path, data_dir, "--unverified")
    capsys.readouterr()
    path.write_bytes(jsonl() + b'{"text": "one more"}\n')
    message = fails("openwebtext_sample", path, "--unverified")
    assert "exists already, prepared from another file or by TFDS; remove it first" in message


def test_a_stock_set_in_another_format_is_left_alone(tmp_path, capsys, fails):
    path, data_dir = download(tmp_path, "cifar10"), tmp_path / "tfds"
    run("cifar10", path, data_dir, "--unverified")
    capsys.readouterr()
    [file] = data_dir.rglob("dataset_info.json")
    # as TFDS leaves it without --file_format=array_record: no note of ours, and another format
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"description": "stock", "fileFormat": "tfrecord"}))
    with pytest.raises(FileNotFoundError, match=r"tfrecord(.|\n)*--data_dir=ANOTHER_DIR\n"):
        open_builder("cifar10", str(data_dir))
    message = fails("cifar10", path, "--unverified")
    assert f"{data_dir}/cifar10/3.0.2 exists already, prepared" in message
    assert "or take another --data_dir" in message
