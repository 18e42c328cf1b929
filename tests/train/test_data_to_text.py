"""Data to text: which tokens count in the loss, what is decoded and scored, the bundled set."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy_models import filled

from configs import gpt2_e2e
from train.data.tokens import Bytes
from train.datasets.registry import open_split
from train.tasks import data_to_text, open_config
from train.tasks.data_to_text import encode_prompts, encode_sentences
from train.tasks.nlg_metrics import nlg_metrics

pytestmark = pytest.mark.usefixtures("quick_compile")

LENGTH, END = 24, Bytes.end_of_text
TRAIN = [("a[b]", "It is b."), ("a[bcd]", "It is bcd."), ("a[b]", "b it is, and more of it.")]
HELD_OUT = [("a[d]", "It is d, I say."), ("a[bd], c[e]", "bd e it is")]
HELD_OUT += [("a[d]", "d it is."), ("f[g]", "No.")]


@pytest.fixture
def make_task(monkeypatch):
    """(**options of the input) -> the task of the plain smoke config, on the texts above."""

    def make(**options):
        config = open_config(gpt2_e2e.get_config("plain,smoke"))
        options = {"length": LENGTH, "label_smoothing": 0.2, "eval_generations": 9} | options
        model = replace(config.model, dropout_rate=0.0)
        config = replace(config, input=replace(config.input, **options), model=model, batch_size=2)

        def read_texts(name, split, data_dir, *features):
            assert features == ("meaning_representation", "reference")
            return iter(HELD_OUT if split == config.eval_split else TRAIN)

        monkeypatch.setattr(data_to_text, "read_texts", read_texts)
        return data_to_text.load(config)

    return make


# --- sequences -----------------------------------------------------------------------


def test_a_sequence_is_meaning_end_reference_end():
    (tokens, start, stop), dropped = encode_sentences(TRAIN, Bytes(), 18)
    first = [*b"a[b]", END, *b" It is b.", END]
    np.testing.assert_array_equal(tokens[0], first + [END] * (19 - len(first)))
    for row, begin, end, (meaning, reference) in zip(tokens, start, stop, TRAIN, strict=False):
        assert bytes(row[: begin - 1].tolist()).decode() == meaning and row[begin - 1] == END
        assert bytes(row[begin : end - 1].tolist()).decode() == " " + reference
        assert np.all(row[end - 1 :] == END)
    assert len(tokens) == 2 and dropped == 1
    # the second has 19 tokens, of which the model sees 18
    assert stop[1] == 19 and encode_sentences(TRAIN, Bytes(), 17)[1] == 2


def test_lengths_that_are_too_small_are_refused(make_task):
    with pytest.raises(ValueError, match=r"none of 3 sentences fits into input\.length 8"):
        make_task(length=8)
    with pytest.raises(ValueError, match=r"input\.length is 12, but the meaning 'a\[bd\], c\[e\]'"):
        encode_prompts([meaning for meaning, _ in HELD_OUT], Bytes(), 12)
    assert encode_prompts(["a[bd], c[e]"], Bytes(), 13)[1] == [12]


def test_the_task_says_what_was_left_out(make_task):
    describe = make_task().describe
    assert describe.startswith("2 sentences of restaurants")
    assert "left out: 1, and 0 held-out ones" in describe


# --- loss ----------------------------------------------------------------------------


def test_loss_is_of_the_reference_and_its_end_alone(make_task):
    """Smoothed in training, not in evaluation; each against the logits of the text by itself."""
    task = make_task()
    (batch,) = task.eval_groups
    model = filled(lambda: task.make_model(nnx.Rngs(0)))
    model.eval()
    # neither the meaning's tokens as targets nor padding count: other padding, the same loss
    place = jnp.arange(LENGTH + 1)
    other = batch._replace(tokens=jnp.where(place >= batch.stop[:, None], 7, batch.tokens))

    @nnx.jit
    def run(model):
        rngs = nnx.Rngs(0)
        smoothed, plain = (task.metrics(model, batch, each)["loss"] for each in (rngs, None))
        return (
            smoothed,
            plain,
            task.metrics(model, other, None)["loss"],
            model(batch.tokens[:, :-1]),
        )

    smoothed, plain, padded, logits = jax.device_get(run(model))
    log_probs = np.asarray(jax.nn.log_softmax(logits.astype(np.float64)))
    for row, (meaning, reference) in enumerate(HELD_OUT):
        target = [*(" " + reference).encode(), END]
        before = log_probs[row, len(meaning) : len(meaning) + len(target)]
        own = -before[np.arange(len(target)), target].sum()
        np.testing.assert_allclose(plain[0][row], own, rtol=1e-4)
        spread = 0.8 * own - 0.2 * before.mean(-1).sum()
        np.testing.assert_allclose(smoothed[0][row], spread, rtol=1e-4)
        assert plain[1][row] == smoothed[1][row] == len(target)
        assert abs(spread / own - 1) > 1e-3
    np.testing.assert_array_equal(padded, plain)
    whole = -np.take_along_axis(log_probs, np.asarray(batch.tokens)[:, 1:, None], -1)
    assert np.all(np.abs(whole.sum((1, 2)) / plain[0] - 1) > 0.05)  # all tokens: another loss


# --- generations ---------------------------------------------------------------------


@pytest.fixture
def speak(monkeypatch):
    """Has a model, here a dict, say model[prompt]; collects the calls."""
    calls = []

    def generate_beam(model, prompt, num_tokens, *, prompt_lengths, end_token, **options):
        calls.append({"shape": prompt.shape, "num_tokens": num_tokens} | options)
        rows = np.full((len(prompt), num_tokens), end_token, np.int32)
        for row, ids, length in zip(rows, prompt, prompt_lengths, strict=True):
            ids = np.asarray(ids)[-int(length) :].tolist()
            assert ids[-1] == end_token
            said = [*model[bytes(ids[:-1]).decode()].encode(), end_token, *b"more"]
            row[: len(said)] = said[:num_tokens]
        return jnp.asarray(rows), None

    monkeypatch.setattr(data_to_text, "generate_beam", generate_beam)
    return calls


PERFECT = {"a[d]": " d it is.", "a[bd], c[e]": " bd e\nit is", "f[g]": " No."}
WRONG = {"a[d]": "zz yy xx", "a[bd], c[e]": " ", "f[g]": "No. No. No."}


def test_every_meaning_is_said_once_and_scored_against_all_its_references(
    make_task, speak, tmp_path, capsys
):
    final = make_task().finish([PERFECT, WRONG], tmp_path)
    references = [["It is d, I say.", "d it is."], ["bd e it is"], ["No."]]
    outputs = [["d it is.", "bd e it is", "No."], ["zz yy xx", "", "No. No. No."]]
    each = [nlg_metrics(texts, references) for texts in outputs]
    assert final == {name: [score[name] for score in each] for name in each[0]}
    assert final["rouge_l"][0] == pytest.approx(100) and final["rouge_l"][1] < 50
    # three prompts in batches of two; 12 tokens of the longest, and 12 more make 24
    call = {"shape": (2, 12), "num_tokens": 12, "beam_size": 2}
    call |= {"length_penalty": 0.9, "no_repeat_ngram": 0, "ngrams_of_prompt": False}
    assert speak == [call] * 4
    written = (tmp_path / "generations.txt").read_text("utf-8").split("\n\n")
    assert written[0] == "meaning: a[d]\npeople:  It is d, I say. / d it is.\nours:    d it is."
    assert written[1].endswith("ours:    bd e it is") and len(written) == 3
    assert ("METEOR is left out" in capsys.readouterr().out) == ("meteor" not in final)


def test_only_the_first_meanings_are_said(make_task, speak, tmp_path):
    final = make_task(eval_generations=1).finish([PERFECT], tmp_path)
    assert [call["shape"] for call in speak] == [(1, 5)]
    assert final["rouge_l"] == pytest.approx([100])
    assert make_task(eval_generations=0).finish([PERFECT], tmp_path / "none") == {}
    assert len(speak) == 1


def test_what_is_said_continues_the_prompt_as_in_training(make_task, tmp_path):
    """Token by token from each prompt alone, without padding before it: the likeliest one."""
    task = make_task(beam_size=1)
    model = filled(lambda: task.make_model(nnx.Rngs(0)), seed=3)
    model.eval()
    next_logits = nnx.jit(lambda model, tokens, last: model(tokens)[0, last])

    def continued(prompt):
        ids = [*prompt.encode(), END]
        for _ in range(12):
            row = np.zeros((1, LENGTH), np.int32)
            row[0, : len(ids)] = ids
            ids.append(int(np.argmax(next_logits(model, row, len(ids) - 1))))
        return " ".join(Bytes().decode(ids[len(prompt) + 1 :]).split())

    task.finish([model], tmp_path)
    written = (tmp_path / "generations.txt").read_bytes().decode().strip("\n").split("\n\nmeaning")
    said = [text.split("\nours:    ")[1] for text in written]
    assert said == [continued(prompt) for prompt in PERFECT]
    assert len(set(said)) == 3 and min(map(len, said)) > 4


# --- the bundled set -----------------------------------------------------------------


def test_restaurants_are_split_by_meaning(data_dir):
    meanings = {}
    for split in ("train", "validation", "test"):
        examples, _ = open_split("restaurants", split, data_dir, *data_to_text._FEATURES)
        for row in examples:
            meaning, text = (row[name].decode() for name in data_to_text._FEATURES)
            meanings.setdefault(meaning, []).append((split, text))
    assert len(meanings) == 432
    for meaning, rows in meanings.items():
        assert len({split for split, _ in rows}) == 1
        assert len({text for _, text in rows}) == 3
        name, food = (part.split("[")[1].rstrip("]") for part in meaning.split(", ")[:2])
        assert all(name in text and food in text for _, text in rows)
        assert all(("riverside" in meaning) == ("the river" in text) for _, text in rows)
        friendly = [any(w in text for w in ("hildren", "family", "adult")) for _, text in rows]
        assert set(friendly) == {"Friendly" in meaning}
    sizes = [sum(rows[0][0] == split for rows in meanings.values()) for split in ("train", "test")]
    assert sizes[0] > 300 and 30 < sizes[1] < 60
