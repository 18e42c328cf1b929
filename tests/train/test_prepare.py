"""`python -m train.prepare`: small made-up files in, prepared sets or a precise error out."""

import io
import json
import lzma
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds

from train.datasets.cifar import Cifar10
from train.datasets.kaggle_enfr import KaggleEnfr
from train.datasets.registry import LOCAL, footnote, open_builder
from train.prepare import main


def kaggle_csv():
    rows = [f"Number {n}.,Numéro {n}." for n in range(400)]
    return "\n".join(["English words/sentences,French words/sentences", *rows]).encode()


def jsonl():
    return b"".join(json.dumps({"id": n, "text": f"page {n}"}).encode() + b"\n" for n in range(60))


def e2e_files():
    def rows(split, count):
        return "\n".join(["mr,ref", *(f"name[{split} {n}],It is {n}." for n in range(count))])

    names = {"trainset.csv": 5, "devset.csv": 3, "testset_w_refs.csv": 2, "testset.csv": 1}
    return {f"e2e-dataset/{name}": rows(name, count).encode() for name, count in names.items()}


RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (14, 32, 32, 3), np.uint8)


def cifar_files(name):
    pixels = np.ascontiguousarray(IMAGES.transpose(0, 3, 1, 2)).reshape(14, 3072)

    def batch(first, count):
        part = {"data": pixels[first : first + count]}
        numbers = list(range(first, first + count))
        if name == "cifar10":
            return part | {"labels": [n % 10 for n in numbers]}
        return part | {"fine_labels": numbers, "coarse_labels": [n % 20 for n in numbers]}

    if name == "cifar10":
        files = {f"data_batch_{i + 1}": batch(2 * i, 2) for i in range(5)}
        files |= {"test_batch": batch(10, 4), "batches.meta": {"label_names": names("a", 10)}}
    else:
        meta = {"fine_label_names": names("f", 100), "coarse_label_names": names("c", 20)}
        files = {"train": batch(0, 10), "test": batch(10, 4), "meta": meta}
    return {f"folder/{key}": pickle.dumps(value, protocol=2) for key, value in files.items()}


def names(letter, count):
    return [f"{letter}{n}" for n in range(count)]


def write_tar(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write(folder, name):
    """A small file for the set, in the form in which it is downloaded."""
    if name == "kaggle_enfr":
        path = folder / "archive.zip"
        with zipfile.ZipFile(path, "w") as zipped:
            zipped.writestr("eng_-french.csv", kaggle_csv())
        return path
    if name == "openwebtext_sample":
        path = folder / "pages.jsonl.xz"
        path.write_bytes(lzma.compress(jsonl()))
        return path
    files = e2e_files() if name == "e2e" else cifar_files(name)
    return write_tar(folder / f"{name}-python.tar.gz", files)


def run(name, path, data_dir, *options):
    main([name, "--from", str(path), "--data_dir", str(data_dir), *options])


def fails(capsys, name, path, data_dir, *options):
    """The error; and nothing may be left behind."""
    before = sorted(data_dir.parent.rglob("*"))
    with pytest.raises(SystemExit) as error:
        run(name, path, data_dir, *options)
    assert sorted(data_dir.parent.rglob("*")) == before
    assert capsys.readouterr().out == ""
    message = error.value.code  # a str: printed to stderr, exit status 1
    assert isinstance(message, str) and message.startswith("error: ")
    return message


COUNTS = {
    "kaggle_enfr": {"train": 400},  # in all splits
    "openwebtext_sample": {"train": 60},
    "e2e": {"train": 5, "validation": 3, "test": 2},
    "cifar10": {"train": 10, "test": 4},
    "cifar100": {"train": 10, "test": 4},
}


@pytest.mark.parametrize("name", list(LOCAL))
def test_every_set_is_prepared_and_footnoted(tmp_path, capsys, name):
    path, data_dir = write(tmp_path, name), tmp_path / "tfds"
    message = fails(capsys, name, path, data_dir)  # not the known file
    assert "examples, expected" in message and "--unverified" in message
    run(name, path, data_dir, "--unverified")
    out = capsys.readouterr().out
    builder = open_builder(name, str(data_dir))
    found = {split: info.num_examples for split, info in builder.info.splits.items()}
    assert set(found) == set(LOCAL[name].KNOWN.counts)
    assert sum(found.values()) == sum(COUNTS[name].values())
    for split, count in found.items():
        assert f"{split:<12}{count:>9,}" in out and len(builder.as_data_source(split)) == count
    note = footnote(builder)
    assert note is not None and note.startswith(f"prepared from {path.name} (sha256 ")
    assert note.endswith(", unverified)") and "unverified." in out
    assert sorted(p.name for p in data_dir.iterdir()) == [name]  # no downloads folder


def test_a_training_command_is_suggested(tmp_path, capsys):
    run("cifar10", write(tmp_path, "cifar10"), tmp_path / "tfds", "--unverified")
    out = capsys.readouterr().out
    command = "python -m train --config=configs/vit_cifar10.py --workdir=runs/vit_cifar10"
    assert f"{command} --config.data_dir={tmp_path / 'tfds'}" in out


@pytest.mark.parametrize("name, classes", [("cifar10", 10), ("cifar100", 100)])
def test_stock_builder_reads_cifar(tmp_path, name, classes):
    run(name, write(tmp_path, name), tmp_path / "tfds", "--unverified")
    builder = tfds.builder(name, data_dir=str(tmp_path / "tfds"), file_format="array_record")
    assert builder.is_prepared()
    label = builder.info.features["label"]
    assert label.num_classes == classes and label.names[0] in ("a0", "f0")
    for split, first in [("train", 0), ("test", 10)]:
        examples = {e["id"].decode(): e for e in builder.as_data_source(split)}
        for index in range(COUNTS[name][split]):
            example = examples[f"{split}_{index:05d}"]
            assert (example["image"] == IMAGES[first + index]).all()
            assert example["label"] == (first + index) % classes
            if name == "cifar100":
                assert example["coarse_label"] == (first + index) % 20


def test_pairs_are_disjoint_by_sentence_and_out_of_order(tmp_path):
    run("kaggle_enfr", write(tmp_path, "kaggle_enfr"), tmp_path / "tfds", "--unverified")
    builder = open_builder("kaggle_enfr", str(tmp_path / "tfds"))
    splits = {s: [e["english"] for e in builder.as_data_source(s)] for s in builder.info.splits}
    both = [sentence for part in splits.values() for sentence in part]
    assert len(set(both)) == len(both) == 400
    file_order = [f"Number {n}.".encode() for n in range(400)]
    train = set(splits["train"])
    assert splits["train"] != [sentence for sentence in file_order if sentence in train]


def test_e2e_keeps_its_splits(tmp_path):
    run("e2e", write(tmp_path, "e2e"), tmp_path / "tfds", "--unverified")
    source = open_builder("e2e", str(tmp_path / "tfds")).as_data_source("validation")
    pairs = sorted((e["meaning_representation"], e["reference"]) for e in source)
    assert pairs == [(b"name[devset.csv %d]" % n, b"It is %d." % n) for n in range(3)]


@pytest.fixture
def known_kaggle(monkeypatch):
    """As if the small csv were the known file."""
    import hashlib

    counts = {k: len(v) for k, v in KaggleEnfr.parse({"f.csv": kaggle_csv()}).items()}
    files = {"eng_-french.csv": hashlib.sha256(kaggle_csv()).hexdigest()}
    known = KaggleEnfr.KNOWN._replace(files=files, counts=counts)
    monkeypatch.setattr(KaggleEnfr, "KNOWN", known)


@pytest.mark.parametrize("form", ["plain", "xz", "zip", "folder"])
@pytest.mark.parametrize("options", [(), ("--unverified",)])
def test_the_known_content_is_verified_in_any_form(tmp_path, known_kaggle, form, options):
    path = tmp_path / "eng_-french.csv"
    if form == "zip":
        path = write(tmp_path, "kaggle_enfr")
    elif form == "folder":
        path = tmp_path / "folder"
        path.mkdir()
        (path / "eng_-french.csv").write_bytes(kaggle_csv())
    else:
        path.write_bytes(lzma.compress(kaggle_csv()) if form == "xz" else kaggle_csv())
    run("kaggle_enfr", path, tmp_path / "tfds", *options)
    builder = open_builder("kaggle_enfr", str(tmp_path / "tfds"))
    assert footnote(builder) is None
    assert ", verified." in (builder.data_path / "dataset_info.json").read_text()


def test_one_changed_letter_or_a_missing_line_is_found(tmp_path, capsys, known_kaggle):
    path = tmp_path / "eng_-french.csv"
    path.write_bytes(kaggle_csv().replace(b"Number 7.", b"Number 7!"))
    message = fails(capsys, "kaggle_enfr", path, tmp_path / "tfds")
    expected = KaggleEnfr.KNOWN.files["eng_-french.csv"]
    assert "sha256 of eng_-french.csv (uncompressed) is" in message
    assert f"expected {expected}" in message and "examples" not in message
    path.write_bytes(kaggle_csv().rsplit(b"\n", 1)[0])
    message = fails(capsys, "kaggle_enfr", path, tmp_path / "tfds")
    assert "it has train" in message and "examples, expected train" in message


def test_bad_files_leave_nothing_behind(tmp_path, capsys):
    data_dir = tmp_path / "tfds"
    path = tmp_path / "file"
    assert "file does not exist; download e2e from https" in fails(capsys, "e2e", path, data_dir)
    path.write_bytes(b"")
    assert "is empty" in fails(capsys, "e2e", path, data_dir)
    path.write_bytes(lzma.compress(jsonl())[:-20])
    for name in LOCAL:
        message = fails(capsys, name, path, data_dir, "--unverified")
        assert "truncated or damaged" in message
    path.write_bytes(jsonl())
    for name, complaint in [
        ("kaggle_enfr", "columns are"),
        ("e2e", "neither a tar or zip archive nor a folder"),
        ("cifar10", "neither a tar or zip archive nor a folder"),
    ]:
        assert complaint in fails(capsys, name, path, data_dir, "--unverified")
    path.write_bytes(kaggle_csv())
    message = fails(capsys, "openwebtext_sample", path, data_dir, "--unverified")
    assert f"{path} is not what openwebtext_sample is made from" in message
    assert "line 1: not JSON" in message
    path.write_bytes(jsonl()[:15])
    message = fails(capsys, "openwebtext_sample", path, data_dir, "--unverified")
    assert "line 1: not JSON" in message
    path.write_bytes(b'{"text": "only one"}\n')
    message = fails(capsys, "openwebtext_sample", path, data_dir, "--unverified")
    assert "has no examples for validation" in message
    other = write_tar(tmp_path / "cifar-100.tar.gz", cifar_files("cifar100"))
    message = fails(capsys, "cifar10", other, data_dir, "--unverified")
    assert "no files for data_batch_1" in message and "holds folder/meta, folder/test" in message


def test_bad_names(tmp_path, capsys):
    path = write(tmp_path, "e2e")
    message = fails(capsys, "e3e", path, tmp_path / "tfds")
    assert "NAME is 'e3e', expected one of kaggle_enfr, openwebtext_sample, e2e" in message
    assert "prepares itself" in fails(capsys, "digits", path, tmp_path / "tfds")


def test_an_interrupted_write_leaves_nothing_behind(tmp_path, capsys, monkeypatch):
    path, data_dir = write(tmp_path, "cifar10"), tmp_path / "new" / "tfds"
    original = Cifar10._generate_examples

    def disk_full(self, examples):
        for count, example in enumerate(original(self, examples)):
            if count == 3:
                assert list(data_dir.rglob("*incomplete*"))  # it was really writing
                raise OSError("No space left on device")
            yield example

    monkeypatch.setattr(Cifar10, "_generate_examples", disk_full)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=r"error: .*No space left on device"):
        run("cifar10", path, data_dir, "--unverified")
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.undo()
    run("cifar10", path, data_dir, "--unverified")
    assert open_builder("cifar10", str(data_dir)).is_prepared()


def test_again_from_the_same_file_is_fine_from_another_not(tmp_path, capsys):
    path, data_dir = tmp_path / "pages.jsonl", tmp_path / "tfds"
    path.write_bytes(jsonl())
    run("openwebtext_sample", path, data_dir, "--unverified")
    run("openwebtext_sample", path, data_dir, "--unverified")
    capsys.readouterr()
    path.write_bytes(jsonl() + b'{"text": "one more"}\n')
    message = fails(capsys, "openwebtext_sample", path, data_dir, "--unverified")
    assert "exists already, prepared from another file or by TFDS; remove it first" in message


def test_a_stock_set_in_another_format_is_left_alone(tmp_path, capsys):
    path, data_dir = write(tmp_path, "cifar10"), tmp_path / "tfds"
    run("cifar10", path, data_dir, "--unverified")
    capsys.readouterr()
    [file] = data_dir.rglob("dataset_info.json")
    # as TFDS leaves it without --file_format=array_record: no note of ours, and another format
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"description": "stock", "fileFormat": "tfrecord"}))
    with pytest.raises(FileNotFoundError) as error:
        open_builder("cifar10", str(data_dir))
    message = str(error.value)
    assert f"cifar10 in {data_dir}/cifar10/3.0.2 is in the format tfrecord" in message
    other = "--data_dir=ANOTHER_DIR\n"
    assert f"tfds build cifar10 --file_format=array_record {other}" in message
    assert f"python -m train.prepare cifar10 --from FILE {other}" in message
    message = fails(capsys, "cifar10", path, data_dir, "--unverified")
    assert f"{data_dir}/cifar10/3.0.2 exists already, prepared" in message
    assert "or take another --data_dir" in message
