"""What the tasks measure and write, against NumPy; and a task of one's own."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy_models import PLAIN, filled

from bdia_jax.losses import softmax_cross_entropy
from bdia_jax.models import attention
from bdia_jax.text.generate import generate
from configs import gpt2_openwebtext, translation_enfr, vit_digits
from train.config import Input, ModelConfig
from train.data.text import PairBucket, pack_documents, pad_right
from train.data.tokens import EOS, Bpe, Bytes
from train.fields import Positive, checked
from train.inference.open_run import open_run
from train.loop import step_inputs
from train.loop.train import train
from train.tasks import (
    TASKS,
    abstract_task,
    images,
    language,
    load_task,
    open_config,
    translation,
)
from train.tasks.task import Task, TaskKind

pytestmark = pytest.mark.usefixtures("quick_compile")


def config_of(module, words="smoke", **options):
    """With `options` in place of its input's."""
    config = open_config(module.get_config(words))
    return replace(config, input=replace(config.input, **options))


def cross_entropy(logits, labels):
    """-log softmax(logits)[label], in float64."""
    logits = np.asarray(logits, np.float64)
    top = logits.max(-1, keepdims=True)
    log_sum = np.log(np.sum(np.exp(logits - top), -1)) + top[..., 0]
    return log_sum - np.take_along_axis(logits, np.asarray(labels)[..., None], -1)[..., 0]


# --- a task of one's own: an input, what it loads, its shapes, a line in TASKS ------------


@checked
class LineInput(Input):
    slope: Positive


class Line(nnx.Module):
    def __init__(self, rngs):
        self.slope = nnx.Param(jax.random.normal(rngs.params()))

    def __call__(self, x):
        return self.slope[...] * x


def line_metrics(model, batch, rngs):
    error = model(batch["x"]) - batch["y"]
    return {"loss": (error**2, jnp.ones_like(error))}


def load_line(config):
    x = np.linspace(-1, 1, 64, dtype=np.float32)
    group = {"x": x, "y": config.input.slope * x}
    return Task((group,), (group,), Line, line_metrics)


def abstract_line(config, tokenizer):
    group = dict.fromkeys("xy", jax.ShapeDtypeStruct((config.batch_size,), jnp.float32))
    return Task((group,), (group,), Line, line_metrics)


LINE = TaskKind(LineInput, {"line": ModelConfig}, load_line, abstract_line)


def test_a_task_of_ones_own_trains_and_is_opened(monkeypatch, tmp_path, data_dir):
    values = vit_digits.get_config("smoke").unlock()
    values.update(task="line", data_dir=data_dir, num_steps=2)
    values.input, values.model = {"slope": 3}, {"name": "line", "dtype": "float32"}
    with pytest.raises(ValueError, match=r"task is 'line', expected one of \('images', "):
        open_config(values)
    monkeypatch.setitem(TASKS, "line", LINE)
    config = open_config(values)
    final = train(config, str(tmp_path / "run"))
    slope = float(open_run(tmp_path / "run").model.slope[...])
    (group,) = load_task(config).eval_groups
    assert final["loss"] == pytest.approx(np.mean(((slope - 3) * group["x"]) ** 2), rel=1e-5)
    start = float(Line(nnx.Rngs(step_inputs.keys(0)[0])).slope[...])
    assert start < slope < 3
    assert jax.tree.leaves(abstract_task(config).train_groups)[0].shape == (32,)
    values.input.slope = -1
    with pytest.raises(ValueError, match=r"input\.slope is -1, expected more than 0"):
        open_config(values)


# --- images --------------------------------------------------------------------------


class Classifier(nnx.Module):
    """A real stack of linear blocks over the pixels of 2 x 2 images."""

    def __init__(self, rngs):
        self.stack = PLAIN(lambda rngs: nnx.Linear(4, 4, rngs=rngs), depth=4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, images, rngs=None):
        return self.head(self.stack(images.reshape(len(images), 4), rngs=rngs))

    def logits_by_numpy(self, images, gamma):
        """Eq. 10 of arXiv 2407.09093 with a constant gamma."""
        blocks = self.stack.blocks
        kernel, bias = (np.float64(leaf[...]) for leaf in (blocks.kernel, blocks.bias))
        x_prev = images.reshape(len(images), 4) * (2 / 255) - 1
        x = x_prev + x_prev @ kernel[0] + bias[0]
        for k in range(1, 4):
            h = x @ kernel[k] + bias[k]
            x_prev, x = x, gamma * x_prev + (1 - gamma) * x + (1 + gamma) * h
        return x @ np.asarray(self.head.kernel[...]) + np.asarray(self.head.bias[...])


def classifier(seed):
    model = filled(lambda: Classifier(nnx.Rngs(0)), seed=seed, scale=0.7)
    model.eval()
    return model


def draw_images(count):
    draw = np.random.default_rng(0).integers
    pixels = draw(256, size=(count, 2, 2, 1), dtype=np.uint8)
    return images.Images(jnp.asarray(pixels), jnp.asarray(draw(3, size=count, dtype=np.int32)))


def test_images_measure_loss_and_accuracy_and_the_accuracy_of_each_gamma(tmp_path):
    held_out, gammas = draw_images(501), (-0.5, 0.0, 0.5)
    pixels, labels = (np.asarray(array) for array in held_out)
    config = config_of(vit_digits, "plain,smoke", inference_gammas=gammas)
    task = images.make_task(config, held_out, held_out, 3)
    models = [classifier(seed) for seed in (1, 2)]
    final = task.finish(models, tmp_path)
    logits = [[model.logits_by_numpy(pixels, gamma) for model in models] for gamma in gammas]
    correct = np.argmax(logits, -1) == labels
    names = [f"accuracy_gamma_{gamma}" for gamma in gammas]
    assert final == {
        n: pytest.approx(each.mean(-1)) for n, each in zip(names, correct, strict=True)
    }
    for of_one_model in zip(*final.values(), strict=True):
        assert len(set(of_one_model)) == 3  # gamma matters here
    assert [model.stack.inference_gamma for model in models] == [0.0, 0.0]

    metrics = task.metrics(models[0], held_out, None)
    assert metrics.keys() == {"loss", "accuracy"}
    np.testing.assert_allclose(metrics["loss"][0], cross_entropy(logits[1][0], labels), atol=1e-4)
    np.testing.assert_array_equal(metrics["accuracy"][0], correct[1, 0])
    for _, weight in metrics.values():
        np.testing.assert_array_equal(weight, np.ones(501))


# --- language ------------------------------------------------------------------------

LENGTH, END = 12, Bytes.end_of_text
DOCUMENTS = ["abcab", "", "ba", "bcabcabcaabbccabc", "ab", "cabbacbabcabcab", "cccabcabacb"]


@pytest.fixture
def text_tasks(monkeypatch):
    """(task of isolated documents, task of one text, a model for both)."""
    config = config_of(gpt2_openwebtext, "plain,smoke", length=LENGTH)

    def load_text(name, split, data_dir, tokenizer, length):
        documents = DOCUMENTS if split == config.eval_split else DOCUMENTS[::-1]
        return pack_documents(map(tokenizer.encode, documents), length, END)

    monkeypatch.setattr(language, "load_text", load_text)
    one_text = replace(config, input=replace(config.input, isolate_documents=False))
    isolated, one_text = map(language.load, (config, one_text))
    model = filled(lambda: isolated.make_model(nnx.Rngs(0)))
    model.eval()
    return isolated, one_text, model


@pytest.mark.claim("documents do not see each other")
@pytest.mark.control("documents do not see each other")
def test_text_loss_is_that_of_every_document_alone(text_tasks):
    """The model sees one document after another, from position 0; the windows pack several."""
    task, _, model = text_tasks
    (windows,) = task.eval_groups
    rows, targets, owner = [], [], []
    for window, tokens in enumerate(np.asarray(windows.tokens)):
        starts = [0, *(i for i in range(1, LENGTH) if tokens[i] == END), LENGTH]
        for start, stop in pairwise(starts):
            rows.append(np.pad(tokens[start:stop], (0, LENGTH - stop + start)))
            targets.append(tokens[start + 1 : stop + 1])
            owner.append(window)
    assert len(rows) > len(windows.tokens) >= 4  # windows hold several documents

    def without(name, model):
        def features(tokens, rngs, **given):
            return model.features(tokens, **{k: v for k, v in given.items() if k != name})

        return SimpleNamespace(features=features, loss=model.loss)

    @nnx.jit
    def evaluate(model, rows):
        blind = [
            task.metrics(without(name, model), windows, None)["loss"][0]
            for name in ("mask", "positions")
        ]
        return task.metrics(model, windows, None), model(rows), blind

    metrics, logits, blind = evaluate(model, jnp.asarray(np.array(rows)))
    expected = np.zeros(len(windows.tokens))
    for row, own_targets, window in zip(np.asarray(logits), targets, owner, strict=True):
        expected[window] += np.sum(cross_entropy(row[: len(own_targets)], own_targets))
    total, weight = metrics["loss"]
    np.testing.assert_allclose(total, expected, rtol=1e-4)
    np.testing.assert_array_equal(weight, np.full(len(windows.tokens), LENGTH))
    # without either, the windows that hold several documents have another loss
    several = np.bincount(owner) > 1
    for other in blind:
        assert np.all(np.abs(other / expected - 1)[several] > 1e-3)


def test_documents_that_are_not_isolated_are_one_text(text_tasks):
    """The loss of each window is that of a model called with its tokens and nothing else."""
    *tasks, model = text_tasks
    (windows,) = tasks[0].eval_groups

    @nnx.jit
    def evaluate(model, tokens):
        losses = [each.metrics(model, windows, None)["loss"] for each in tasks]
        return losses, model(tokens[:, :-1])

    ((isolated, _), (total, weight)), logits = evaluate(model, windows.tokens)
    expected = cross_entropy(logits, windows.tokens[:, 1:]).sum(-1)
    np.testing.assert_allclose(total, expected, rtol=1e-4)
    np.testing.assert_array_equal(weight, np.full(len(expected), LENGTH))
    several = np.any(np.asarray(windows.tokens)[:, 1:LENGTH] == END, axis=-1)
    assert several.sum() >= 3  # windows hold several documents
    assert np.all(np.abs(isolated / expected - 1)[several] > 1e-3)


def test_only_isolated_documents_need_a_mask(text_tasks, monkeypatch):
    """What attention chooses its implementation by; any mask rules out flash attention."""
    masks = []

    def choose(q, mask, device):
        masks.append(mask if mask is None else mask.shape)
        return "xla"

    monkeypatch.setattr(attention, "choose_implementation", choose)
    jax.clear_caches()  # a block that was traced before is not traced again
    *tasks, model = text_tasks
    for task in tasks:
        (windows,) = task.train_groups
        nnx.eval_shape(lambda m, task=task, w=windows: task.metrics(m, w, nnx.Rngs(0)), model)
    assert set(masks) == {(len(windows.tokens), 1, LENGTH, LENGTH), None}
    assert masks.index(None) * 2 == len(masks)  # the first half has one


@pytest.mark.full
def test_samples_continue_the_held_out_windows(text_tasks, tmp_path):
    task, _, model = text_tasks
    assert task.finish([model, "not asked"], tmp_path) == {}
    prompt = task.eval_groups[0].tokens[:4, : LENGTH // 4]
    tokens = np.asarray(
        generate(model, prompt, LENGTH - LENGTH // 4, key=jax.random.key(0), temperature=0.8)
    )
    np.testing.assert_array_equal(tokens[:, :3], prompt)
    samples = (tmp_path / "samples.txt").read_bytes().decode().split("\n==========\n")
    assert len(samples) == 4
    for sample, row in zip(samples, tokens, strict=True):
        begin, rest = (Bytes().decode(part) for part in (row[:3], row[3:]))
        assert sample == f"{begin}\n--- continued:\n{rest}\n" and begin


# --- translation ---------------------------------------------------------------------


def test_translation_loss_is_of_the_target_alone_not_of_padding():
    draw = np.random.default_rng(1)
    table, shift = draw.normal(size=(2, 9, 9))
    source = np.array([[3, 4, 2, 0], [5, 2, 0, 0], [6, 7, 8, 2]])
    targets = [[3, 4, 5], [6], []]
    target_in = np.array([[1, 3, 4, 5], [1, 6, 0, 0], [1, 0, 0, 0]])
    target_out = np.array([[3, 4, 5, 2], [6, 2, 0, 0], [2, 0, 0, 0]])

    def features(source, target_in, rngs):
        """The logits themselves: the model's table is the identity."""
        assert rngs is None
        return jnp.asarray(table)[target_in] + jnp.asarray(shift)[source].sum(1, keepdims=True)

    def loss(features, labels):
        return softmax_cross_entropy(features, jnp.eye(9), labels)

    model = SimpleNamespace(features=features, loss=loss)
    total, weight = translation._metrics(model, PairBucket(source, target_in, target_out), None)[
        "loss"
    ]
    for row, target in enumerate(targets):
        before, after = [1, *target], [*target, 2]
        logits = table[before] + shift[source[row]].sum(0)
        np.testing.assert_allclose(total[row], cross_entropy(logits, after).sum(), rtol=1e-5)
    np.testing.assert_array_equal(weight, [4, 2, 1])


PAIRS = [
    ("the black cat sleeps on the bed", "le chat noir dort sur le lit"),
    ("my young brother eats a red apple", "mon jeune frère mange une pomme rouge"),
    ("the black cat sleeps on the bed", "sur le lit le chat noir fait un somme"),
    ("it rains", "il pleut beaucoup trop ici ce matin"),
]


@pytest.fixture
def pair_task(monkeypatch):
    """The task of PAIRS. A model is a function of a source, which says the translation."""
    config = config_of(translation_enfr, vocab_size=400, boundaries=(64,), eval_translations=3)

    def read_texts(name, split, *_):
        return iter(PAIRS if split == config.eval_split else PAIRS[::-1])

    def translate(model, source, max_len, *, beam_size):
        assert (source.shape, max_len, beam_size) == ((2, 64), 64, config.input.beam_size)
        outputs = [model.translation[tokenizer.decode(ids)] for ids in source]
        return pad_right([[*tokenizer.encode(each), EOS] for each in outputs], max_len), None

    monkeypatch.setattr(translation, "read_texts", read_texts)
    monkeypatch.setattr(translation, "translate", translate)
    task = translation.load(config)
    tokenizer = task.tokenizer
    return task


def test_a_source_that_is_too_long_is_cut_and_still_ends(pair_task, monkeypatch):
    monkeypatch.setattr(translation, "translate", lambda model, source, max_len: (source, None))
    bpe, model = pair_task.tokenizer, SimpleNamespace(max_len=8)
    sources = [f"{i} {'ab' * (i % 11)}" for i in range(9)]
    ids = [bpe.encode(source) for source in sources]
    assert {len(each) > 7 for each in ids} == {True, False}
    outputs = translation.translate_texts(model, bpe, sources, 8)
    assert outputs == [bpe.decode(each[:7]) for each in ids]
    rows = pad_right([[*each[:7], EOS] for each in ids], 8)
    assert np.all(np.sum(rows == EOS, axis=1) == 1)


def test_bleu_and_translations_of_every_model(pair_task, tmp_path):
    first, second = dict(PAIRS[:2]), dict(PAIRS[1:3])  # one of the two references of the cat
    shorter = {source: target.rsplit(" ", 1)[0] for source, target in first.items()}
    models = [SimpleNamespace(max_len=64, translation=each) for each in (shorter, first, second)]
    final = pair_task.finish(models, tmp_path)
    # every n-gram of the first is right; what is left is the brevity penalty, 14 words for 12
    assert final.keys() == {"bleu"}
    np.testing.assert_allclose(final["bleu"], [100 * np.exp(1 - 14 / 12), 100, 100], rtol=1e-6)
    cat, brother = PAIRS[0][0], PAIRS[1][0]
    assert (tmp_path / "translations.txt").read_text() == (
        f"en:   {cat}\nfr:   {first[cat]} / {second[cat]}\nours: {shorter[cat]}\n\n"
        f"en:   {brother}\nfr:   {first[brother]}\nours: {shorter[brother]}\n"
    )
    pair_task.tokenizer.save(tmp_path / "tokenizer.json")  # as train() does in a workdir
    saved = Bpe.load(tmp_path / "tokenizer.json")
    for groups, pairs in ((pair_task.train_groups, PAIRS[::-1]), (pair_task.eval_groups, PAIRS)):
        (bucket,) = groups
        decoded = [tuple(map(saved.decode, rows)) for rows in zip(*bucket, strict=True)]
        assert decoded == [(english, french, french) for english, french in pairs]
