"""Small made-up files in the form in which data sets are downloaded."""

import io
import json
import lzma
import pickle
import tarfile
import zipfile

import numpy as np

IMAGES = np.random.default_rng(0).integers(0, 256, (14, 32, 32, 3), np.uint8)


def tar_of(files, mode="w"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zip_of(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in files.items():
            zipped.writestr(name, content)
    return buffer.getvalue()


def kaggle_csv(rows=None):
    rows = rows or [(f"Number {n}.", f"Numéro {n}.") for n in range(400)]
    lines = ["English words/sentences,French words/sentences", *(f"{e},{f}" for e, f in rows)]
    return "\r\n".join(lines).encode()


def jsonl():
    return b"".join(json.dumps({"id": n, "text": f"page {n}"}).encode() + b"\n" for n in range(60))


def plays():
    """Three documents' worth of speeches, and a tenth for validation."""
    return b"".join(b"ROMEO %d:\n%s\n\n" % (n, b"Ay me. " * 140) for n in range(13))


def e2e_files():
    def rows(split, count):
        return "\n".join(["mr,ref", *(f"name[{split} {n}],It is {n}." for n in range(count))])

    names = {"trainset.csv": 5, "devset.csv": 3, "testset_w_refs.csv": 2, "testset.csv": 1}
    return {f"e2e-dataset/{name}": rows(name, count).encode() for name, count in names.items()}


def cifar_batch(first, count, **labels):
    pixels = IMAGES[first : first + count].transpose(0, 3, 1, 2).reshape(count, 3072)
    return {"data": pixels, **{name: of(first, count) for name, of in labels.items()}}


def cifar_files(name):
    def below(limit):
        return lambda first, count: [n % limit for n in range(first, first + count)]

    def names(letter, count):
        return [f"{letter}{n}" for n in range(count)]

    if name == "cifar10":
        files = {f"data_batch_{i + 1}": cifar_batch(2 * i, 2, labels=below(10)) for i in range(5)}
        files["test_batch"] = cifar_batch(10, 4, labels=below(10))
        files["batches.meta"] = {"label_names": names("a", 10)}
    else:
        labels = {"fine_labels": below(100), "coarse_labels": below(20)}
        files = {"train": cifar_batch(0, 10, **labels), "test": cifar_batch(10, 4, **labels)}
        files["meta"] = {
            "fine_label_names": names("f", 100),
            "coarse_label_names": names("c", 20),
        }
    return {f"folder/{key}": pickle.dumps(value, protocol=2) for key, value in files.items()}


def download(folder, name):
    """The path of a small file for the set, in the form in which it is downloaded."""
    file, content = {
        "kaggle_enfr": lambda: ("archive.zip", zip_of({"eng_-french.csv": kaggle_csv()})),
        "openwebtext_sample": lambda: ("pages.jsonl.xz", lzma.compress(jsonl())),
        "tinyshakespeare": lambda: ("input.txt", plays()),
        "e2e": lambda: ("e2e.tar.gz", tar_of(e2e_files(), "w:gz")),
    }.get(name, lambda: (f"{name}.tar.gz", tar_of(cifar_files(name), "w:gz")))()
    (folder / file).write_bytes(content)
    return folder / file
