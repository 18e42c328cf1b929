"""Text: tokenizers, packed documents, buckets of sentence pairs, data sets."""

import random

import jax
import numpy as np
import pytest
import requests
import tiktoken

from configs import translation_enfr
from train.data import text
from train.data.text import (
    attention_mask,
    bucket_pairs,
    in_batches,
    load_text,
    pack_documents,
    pad_left,
    positions,
    read_texts,
    segments,
)
from train.data.tokens import BOS, EOS, PAD, Bpe, Bytes, Gpt2
from train.tasks import open_config

FRENCH = [
    "L'élève naïf a mangé où ça ?",
    "Là-bas, un garçon crie : « Noël ! »",
    "Le cœur a ses raisons\nque la raison ne connaît point.",
]
ENGLISH = ["The naive pupil ate where?", "Over there, a boy shouts.", "The heart has reasons."]
ODD = ["", " ", "<eos><pad> <|endoftext|>", "日本 😀\u2028\x00", "e\u0301 is not é"]
END = 9


@pytest.fixture(scope="module")
def bpe():
    return Bpe.train(FRENCH * 9 + ENGLISH * 9, vocab_size=330)


@pytest.fixture
def small_gpt2(monkeypatch):
    """GPT-2's class over an encoding of bytes alone, as the real one needs files."""
    ranks = {bytes([value]): value for value in range(256)}
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": encoding}.__getitem__)
    return Gpt2()


@pytest.mark.parametrize("name", ["bpe", "bytes", "gpt2"])
def test_texts_come_back(name, bpe, small_gpt2):
    tokenizer = {"bpe": bpe, "bytes": Bytes(), "gpt2": small_gpt2}[name]
    specials = {PAD, BOS, EOS} if name == "bpe" else {tokenizer.end_of_text}
    for line in FRENCH + ENGLISH + ODD:
        ids = tokenizer.encode(line)
        assert tokenizer.decode(ids) == line
        assert not specials & set(ids) and max(ids, default=0) < tokenizer.vocab_size
        if len(ids) > 1:
            assert tokenizer.decode(ids[::-1]) != line
        with_specials = np.array([*specials, *ids, *specials], np.int32)
        assert tokenizer.decode(with_specials) == line
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\ufffd" or name == "bpe"


def test_bpe_learns_from_its_texts_and_is_saved(bpe, tmp_path):
    line = FRENCH[1]
    assert bpe.vocab_size == 330
    assert len(bpe.encode(line)) < len(line.encode()) / 1.5
    untrained = Bpe.train([], vocab_size=330)
    assert untrained.vocab_size == 259
    assert len(untrained.encode(line)) == len(line.encode())
    with pytest.raises(ValueError, match="vocab_size is 258, expected at least 259"):
        Bpe.train(FRENCH, vocab_size=258)
    lines = FRENCH * 9 + ENGLISH * 9
    random.Random(0).shuffle(lines)
    Bpe.train(iter(lines), vocab_size=330).save(tmp_path / "again.json")
    bpe.save(tmp_path / "bpe.json")
    saved = (tmp_path / "bpe.json").read_bytes()
    assert (tmp_path / "again.json").read_bytes() == saved
    Bpe.train(FRENCH, vocab_size=330).save(tmp_path / "other.json")
    assert (tmp_path / "other.json").read_bytes() != saved
    loaded = Bpe.load(tmp_path / "bpe.json")
    assert loaded.vocab_size == 330
    for line in FRENCH + ODD:
        assert loaded.encode(line) == bpe.encode(line)


def test_gpt2_without_files_says_what_to_do(monkeypatch, tmp_path):
    def offline(*_, **__):
        raise requests.exceptions.ConnectionError("no network")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(requests, "get", offline)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    with pytest.raises(FileNotFoundError) as error:
        Gpt2()
    message = str(error.value)
    address = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    assert f"{address}encoder.json  as  6c7ea1a7e38e3a7f062df639a5b80947f075ffe6" in message
    assert f"{address}vocab.bpe  as  6d1cbeee0f20b3d9449abfede4726ed8212e3aee" in message
    assert "TIKTOKEN_CACHE_DIR" in message and "no network" in message


def documents(count=40):
    rng = random.Random(3)
    return [[rng.randrange(END) for _ in range(rng.randrange(12))] for _ in range(count)]


def test_packing_keeps_every_token_in_order():
    docs = documents()
    windows = pack_documents(iter(docs), 7, END)
    stream = [token for doc in docs for token in (END, *doc)]
    assert windows.dtype == np.int32 and windows.shape == ((len(stream) - 1) // 7, 8)
    assert (windows[1:, 0] == windows[:-1, -1]).all()
    packed = [END, *windows[:, 1:].ravel().tolist()]
    assert packed == stream[: len(packed)] and len(stream) % 7 != 1
    assert pack_documents([[1, 2]], 2, END).tolist() == [[END, 1, 2]]
    for too_few in ([], [[1, 2]]):
        with pytest.raises(ValueError, match=r"a window needs 4; take a smaller length"):
            pack_documents(too_few, 3, END)


def test_masks_and_positions_end_with_the_document():
    tokens = pack_documents(documents(), 11, END)[:, :-1]
    document = np.asarray(segments(tokens, END))
    place = np.asarray(positions(tokens, END))
    mask = np.asarray(attention_mask(document))
    size = tokens.shape[1]
    assert document.dtype == place.dtype == np.int32
    assert mask.shape == (len(tokens), 1, size, size) and mask.dtype == bool
    crossings = 0
    for b, row in enumerate(tokens.tolist()):
        for t in range(size):
            for s in range(t + 1):
                crosses = END in row[s + 1 : t + 1]
                assert mask[b, 0, t, s] == mask[b, 0, s, t] == (not crosses)
                crossings += crosses
            starts = [s for s in range(t + 1) if row[s] == END]
            assert place[b, t] == t - (starts[-1] if starts else 0)
            assert document[b, t] == len(starts)
    assert crossings > 100
    window = np.array([[5, END, 1, 2, END, END, 3]])
    assert segments(window, END).tolist() == [[0, 1, 1, 1, 2, 3, 3]]
    assert positions(window, END).tolist() == [[0, 0, 1, 2, 0, 0, 1]]
    jitted = jax.jit(positions, static_argnums=1)
    assert (np.asarray(jitted(tokens, END)) == place).all()


class Numbers:
    """Text of numbers to these numbers."""

    def encode(self, line):
        return [*map(int, line.split())]


def test_buckets_lose_no_pair():
    rng = random.Random(0)
    sides = [[rng.randrange(3, 50) for _ in range(rng.randrange(14))] for _ in range(400)]
    pairs = [[source, target] for source, target in zip(sides[::2], sides[1::2], strict=True)]
    boundaries = (4, 8, 12)
    texts = [[" ".join(map(str, side)) for side in pair] for pair in pairs]
    buckets, dropped = bucket_pairs(texts, Numbers(), boundaries)
    found = []
    for size, bucket in zip(boundaries, buckets, strict=True):
        assert {array.shape for array in bucket} == {(len(bucket.source), size)}
        assert {array.dtype for array in bucket} == {np.dtype(np.int32)}
        for src, tgt_in, tgt_out in zip(*(array.tolist() for array in bucket), strict=True):
            s, t = src[: src.index(EOS)], tgt_out[: tgt_out.index(EOS)]
            found.append([s, t])
            assert src == s + [EOS] + [PAD] * (size - 1 - len(s))
            assert tgt_in == [BOS, *t] + [PAD] * (size - 1 - len(t))
            assert tgt_out == t + [EOS] + [PAD] * (size - 1 - len(t))
            smaller = [other for other in boundaries if other < size]
            assert all(max(len(s), len(t)) + 1 > other for other in smaller)
    too_long = [pair for pair in pairs if max(map(len, pair)) + 1 > 12]
    assert dropped == len(too_long) > 0
    assert sorted(found + too_long) == sorted(pairs)
    # an empty bucket is left out, and the order of the pairs kept
    (only,), dropped = bucket_pairs([("3", "5"), ("4", "6 7")], Numbers(), (1, 3))
    assert dropped == 0 and only.source[:, 0].tolist() == [3, 4]
    with pytest.raises(ValueError, match="none of 1 pairs fits into 3 tokens"):
        bucket_pairs([("3 3 3", "3")], Numbers(), (2, 3))


@pytest.mark.parametrize("boundaries", [(), (8, 4), (4, 4), (0, 4)])
def test_boundaries_rise(boundaries):
    config = translation_enfr.get_config()
    config.input.boundaries = boundaries
    with pytest.raises(ValueError, match=r"input.boundaries .* expected rising positive lengths"):
        open_config(config)


def test_prompts_are_padded_on_the_left():
    rows, lengths = pad_left([[1, 2], [], [3, 4, 5]], END)
    assert rows.tolist() == [[END, 1, 2], [END] * 3, [3, 4, 5]] and lengths.tolist() == [2, 0, 3]
    assert pad_left([], END)[0].shape == (0, 0)


def test_all_rows_are_done_in_batches_of_one_shape():
    shapes = []

    def add(a, b):
        shapes.append((a.shape, b.shape))
        return a[:, 0] + b

    a, b = np.arange(14).reshape(7, 2), 100 * np.arange(7)
    assert in_batches(add, 3, a, b).tolist() == (a[:, 0] + b).tolist()
    assert in_batches(add, 9, a, b).tolist() == (a[:, 0] + b).tolist()
    assert shapes == [((3, 2), (3,))] * 3 + [((7, 2), (7,))]


class Pairs:
    """English as bytes, French as str: TFDS versions differ in what a Text feature gives."""

    def __len__(self):
        return len(ENGLISH)

    def __getitems__(self, keys):
        return [{"english": ENGLISH[k].encode(), "french": FRENCH[k]} for k in keys]


def test_pairs_of_a_data_set(monkeypatch):
    splits = {("pairs", "train", "somewhere", "english", "french"): (Pairs(), None)}
    monkeypatch.setattr(text, "open_split", lambda *arguments: splits[arguments])
    pairs = list(read_texts("pairs", "train", "somewhere", "english", "french"))
    assert pairs == list(zip(ENGLISH, FRENCH, strict=True))


def test_bundled_sets_are_read(tmp_path):
    data_dir = str(tmp_path)
    with pytest.raises(ValueError, match="pydoc has no split 'dev'; it has train, validation"):
        read_texts("pydoc", "dev", data_dir, "text")
    with pytest.raises(ValueError, match="pydoc has no feature english, french; it has text"):
        read_texts("pydoc", "train", data_dir, "english", "french")
    with pytest.raises(ValueError, match=r"split 'train\[:0\]' of pydoc is empty"):
        load_text("pydoc", "train[:0]", data_dir, Bytes(), 64)
    [*topics] = read_texts("pydoc", "validation", data_dir, "text")
    packed = load_text("pydoc", "validation", data_dir, Bytes(), 64)
    stream = packed[:, 1:].ravel()
    assert Bytes().decode(stream) in "".join(topic for (topic,) in topics)
    assert (stream == Bytes.end_of_text).sum() in range(len(topics) - 3, len(topics))
