"""train.generate and train.evaluate: what they print and measure, with tiny models."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy_models import filled

from bdia_jax import FixedPoint
from bdia_jax.baselines import MidpointStack
from bdia_jax.models.gpt2 import GPT2
from bdia_jax.models.transformer import Transformer
from bdia_jax.text.generate import generate as generate_tokens
from configs import gpt2_openwebtext
from train import evaluate, generate
from train.data.text import PairBucket, attention_mask, positions, segments
from train.data.tokens import EOS, PAD, Bpe, Bytes
from train.inference.agreement import compare
from train.inference.open_run import Run, open_run
from train.loop.train import train
from train.tasks import load_task, open_config, translation

pytestmark = pytest.mark.usefixtures("quick_compile")


def small_gpt2(vocab_size=257, **options):
    sizes = {"width": 16, "depth": 3, "num_heads": 2, "mlp_dim": 24} | options
    model = filled(lambda: GPT2(vocab_size, 32, **sizes, rngs=nnx.Rngs(0)), seed=52)
    model.eval()
    return model


def small_transformer():
    sizes = {"width": 16, "encoder_depth": 2, "decoder_depth": 2, "num_heads": 2, "mlp_dim": 24}
    model = filled(lambda: Transformer(300, 8, **sizes, rngs=nnx.Rngs(0)), seed=7)
    model.eval()
    return model


@pytest.fixture
def opens(monkeypatch):
    """(model, tokenizer, config, end_tokens) -> what --from names."""

    def set_run(*parts):
        run = Run(*parts, *(None,) * (3 - len(parts)))
        for program in (generate, evaluate):
            monkeypatch.setattr(program, "open_run", lambda folder, data_dir="": run)

    return set_run


def error_of(program, *words):
    with pytest.raises(SystemExit) as stopped:
        program.main(["--from", "runs/x", *words])
    message = str(stopped.value)
    assert message.startswith("error: ")
    return message


# --- train.generate ------------------------------------------------------------------


@pytest.mark.full
def test_end_of_text_comes_between_a_meaning_and_its_sentence(opens, capsys):
    model, tokenizer = small_gpt2(), Bytes()
    opens(model, tokenizer)
    printed = []
    for words in (["--meaning"], []):
        generate.main(["--from", "x", "--prompt=ab", "--temperature=0", "--num_tokens=9", *words])
        printed.append(capsys.readouterr().out.strip())
    prompt = jnp.array([[*tokenizer.encode("ab"), tokenizer.end_of_text]])
    new = generate_tokens(model, prompt, 9, temperature=0.0, end_token=tokenizer.end_of_text)
    assert printed[0] == f"ab\n{tokenizer.decode(new[0, 3:].tolist())}".strip()
    assert printed[0] != printed[1].replace("ab", "ab\n", 1)


@nnx.jit
def evaluated(model, tokens):
    return model(tokens)


def test_prompts_of_several_lengths_are_continued(opens, capsys, tmp_path):
    model, tokenizer = small_gpt2(), Bytes()
    opens(model, tokenizer)
    (tmp_path / "more.txt").write_text("é\n")
    words = ["--prompt=abcdef", "--prompt=", f"--prompt-file={tmp_path / 'more.txt'}"]
    generate.main(["--from=runs/x", *words, "--num_tokens=6", "--temperature=0"])
    expected = []
    for prompt in ("abcdef", "", "é"):
        ids = tokenizer.encode(prompt) or [tokenizer.end_of_text]
        for _ in range(6):
            padded = jnp.array([ids + [0] * (12 - len(ids))])
            ids.append(int(jnp.argmax(evaluated(nnx.clone(model), padded)[0, len(ids) - 1])))
        expected.append(tokenizer.decode(ids))
    assert len({text[-4:] for text in expected}) == 3
    assert model.stack.fixed_point is None  # a checkpoint, not a run
    assert capsys.readouterr().out == "\n==========\n".join(expected) + "\n"


def test_a_beam_and_a_draw_get_their_options(opens, capsys, monkeypatch):
    opens(small_gpt2(300), Bytes())
    calls = []

    def search(model, prompt, num_tokens, **options):
        calls.append(options)
        return jnp.array([[104, 105, 299, 256, 256]]), None  # 299 is no byte, 256 the end

    def draw(model, prompt, num_tokens, *, key, **options):
        calls.append(options)
        assert key == jax.random.key(3)
        return jnp.concatenate([prompt, prompt], axis=1)

    monkeypatch.setattr(generate, "generate_beam", search)
    monkeypatch.setattr(generate, "generate", draw)
    start = ["--from", "runs/x", "--prompt", "ab"]
    beam = ["--beam_size=4", "--length_penalty=0.9", "--no_repeat_ngram=3"]
    generate.main([*start, *beam])
    generate.main([*start, "--seed=3", "--top_k=5", "--temperature=0.7"])
    assert capsys.readouterr().out == "abhi\nabab\n"
    whole = {"prompt_lengths": None, "end_token": (256,)}
    assert calls == [
        whole | {"beam_size": 4, "length_penalty": 0.9, "no_repeat_ngram": 3},
        whole | {"top_k": 5, "temperature": 0.7},
    ]


def test_sources_are_translated(opens, capsys, monkeypatch):
    bpe = Bpe.train(["un deux trois", "one two three"], vocab_size=300)
    opens(small_transformer(), bpe)

    def copy(model, source, max_len, **options):
        assert np.all(np.sum(np.asarray(source) == EOS, axis=1) == 1)
        assert (max_len, options) == (8, {"beam_size": 3, "length_penalty": 0.6})
        return source, None

    monkeypatch.setattr(translation, "translate", copy)
    generate.main(["--from", "runs/x", "--source", "one", "--source", "two three", "--beam_size=3"])
    assert capsys.readouterr().out == "one\ntwo three\n"
    assert "'abcdefghijkl'" in error_of(generate, "--source", "abcdefghijkl", "--source", "a")
    assert "Transformer, which takes --source" in error_of(generate, "--prompt", "one")


def test_generate_refuses_what_does_not_fit(opens):
    assert "expected --prompt" in error_of(generate)
    opens(small_gpt2(100), None)
    assert "GPT2, which takes --prompt" in error_of(generate, "--source", "a")
    assert "--tokenizer=gpt2, or bytes" in error_of(generate, "--prompt", "a")
    bytes_of_it = ("--tokenizer=bytes", "--prompt")
    assert "the token 233, but the model only 100" in error_of(generate, *bytes_of_it, "\u9999")
    assert "num_tokens is 100, expected 1 to 31" in error_of(generate, *bytes_of_it, "!")
    opens(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), None)
    assert "Linear, which takes no text" in error_of(generate, "--prompt", "a")


# --- train.evaluate ------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir):
    config = open_config(gpt2_openwebtext.get_config("smoke"))
    config = replace(config, data_dir=data_dir, input=replace(config.input, length=32))
    workdir = tmp_path_factory.mktemp("run") / "gpt2"
    return workdir, train(config, str(workdir)), load_task(config).eval_groups


@pytest.mark.full
@pytest.mark.claim("inference in floating point is a rounding away")
def test_the_loss_by_both_paths_and_how_far_they_are_apart(trained, capsys, tmp_path):
    workdir, final, (group,) = trained
    out = tmp_path / "new" / "agreement.json"
    assert len(group.tokens) % 5
    evaluate.main(["--from", str(workdir), "--batch_size=5", "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["examples"] == len(group.tokens) and result["split"] == "validation[:1]"
    assert result["fixed_point"]["loss"] == pytest.approx(final["loss"], rel=1e-5)

    model = open_run(workdir).model

    @nnx.jit
    def both(model, tokens):
        """x_K of each path, of all examples at once."""
        place, document = positions(tokens, 256), segments(tokens, 256)
        x = model.embedding[...][tokens] + model.positions[...][place]
        ends = []
        for fixed_point in (FixedPoint(), None):
            model.stack.fixed_point, model.stack.backprop = fixed_point, "store"
            ends.append(model.stack(x, attention_mask(document)))
        return ends

    first, second = (np.float64(x) for x in both(nnx.clone(model), group.tokens[:, :-1]))
    quanta = np.abs(first - second) * 2**9
    gap = result["last_state_quanta"]["stack"]
    # sums of another batch size are in another order, which may flip a rounding
    assert gap["largest"] == pytest.approx(quanta.max(), rel=0.2)
    assert gap["rms"] == pytest.approx(np.sqrt(np.mean(quanta**2)), rel=0.02)
    block = result["one_block_quanta"]["stack"]
    assert 0.49 < block["largest"] <= 0.5 < gap["largest"]
    assert block["rms"] == pytest.approx(np.sqrt(1 / 12), abs=0.01)

    difference = result["fixed_point"]["loss"] - result["float"]["loss"]
    assert result["difference"]["loss"] == difference != 0
    printed = capsys.readouterr().out
    assert f"{result['float']['loss']:.6f}" in printed and f"{gap['largest']:.3f}" in printed


@pytest.mark.full
def test_a_checkpoint_is_evaluated_on_any_texts(opens, capsys, data_dir):
    opens(small_gpt2(), None)
    options = ["--tokenizer=bytes", f"--data_dir={data_dir}", "--split=validation[:1]"]
    evaluate.main(["--from", "hf", "--dataset=pydoc", "--frac_bits=4", "--batch_size=64", *options])
    printed = capsys.readouterr().out
    assert "hf on " in printed and "pydoc validation[:1]" in printed and "2^-4" in printed
    assert "name one: --dataset" in error_of(evaluate, *options)
    assert "--tokenizer=gpt2" in error_of(evaluate, "--dataset=pydoc", f"--data_dir={data_dir}")
    opens(small_gpt2(100), None)
    assert "the token 256, but the model only 100" in error_of(
        evaluate, "--dataset=pydoc", *options
    )


@pytest.mark.claim("inference in floating point is a rounding away")
@pytest.mark.control("inference in floating point is a rounding away")
def test_every_stack_of_a_model_is_compared():
    draw = np.random.default_rng(0).integers
    source, target_in, target_out = draw(3, 300, (3, 4, 6))
    source[:, -1] = target_out[:, -1] = PAD
    groups = (PairBucket(*map(jnp.asarray, (source, target_in, target_out))),)
    found = compare(small_transformer(), translation._metrics, groups, 4, FixedPoint())
    assert found.last_state.keys() == found.one_block.keys() == {"encoder", "decoder"}
    for name, block in found.one_block.items():
        assert 0.45 < block.largest <= 0.5 < found.last_state[name].largest
    assert found.quantized["loss"] == pytest.approx(found.unquantized["loss"], abs=0.05)
    assert found.quantized["loss"] != found.unquantized["loss"]


def test_a_baseline_has_no_fixed_point():
    model = nnx.eval_shape(lambda: small_gpt2(stack=partial(MidpointStack, backprop="store")))
    with pytest.raises(ValueError, match="stacks are MidpointStack"):
        compare(model, None, (), 1, FixedPoint())
