"""From a checkpoint to a run and back to a standard one; what is refused on the way."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from toy import assert_same_bits
from toy_models import filled

import train.loop.train as program
from bdia_jax import interop
from bdia_jax.models.gpt2 import GPT2
from bdia_jax.models.vit import ViT
from configs import gpt2_e2e, gpt2_openwebtext, resnet15_cifar10, translation_enfr, vit_digits
from train.data.tokens import Bpe, Bytes
from train.export import export
from train.inference.open_run import Run, end_tokens, open_run
from train.loop.gamma import loss_at_start
from train.loop.log import read_records
from train.loop.program import make_program
from train.loop.train import train
from train.run.checkpoint import Checkpoints
from train.run.pretrained import FOLDER, keep_description, read_params
from train.run.workdir import open_workdir
from train.tasks import load_task, open_config

pytestmark = pytest.mark.usefixtures("quick_compile")

TOKENS = np.arange(24).reshape(2, 12)


def small_gpt2(vocab_size=257):
    return filled(
        lambda: GPT2(vocab_size, 160, width=8, depth=2, num_heads=2, mlp_dim=12, rngs=nnx.Rngs(0)),
        scale=0.2,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A GPT-2 for the tokenizer "bytes", as Hugging Face keeps it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "gpt2"
    interop.save(small_gpt2(), folder)
    return folder


def configure(module, arg, folder, data_dir, **changes):
    config = module.get_config(arg).unlock()
    config.update({"init_from": str(folder), "data_dir": data_dir} | changes)
    return open_config(config.lock())


def restaurants(run, folder, data_dir, **changes):
    short = {"num_steps": 4, "log_every_steps": 1, "checkpoint_every_steps": 2}
    no_outputs = {"input": {"length": 160, "eval_generations": 0}}
    return configure(gpt2_e2e, f"{run},smoke", folder, data_dir, **short | no_outputs | changes)


def state_of(workdir, config):
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.restore(make_program(config, load_task(config)).abstract_state)


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def same_bits(a, b):
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def params_of(folder):
    """Those of a checkpoint."""
    return flat(nnx.to_pure_dict(nnx.state(interop.load(folder, rngs=nnx.Rngs(0)), nnx.Param)))


# --- runs ----------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def lora_run(folder, data_dir, tmp_path_factory):
    """(its workdir, config, another that was killed behind its first checkpoint)."""
    config = restaurants("lora_bdia", folder, data_dir)
    straight, killed = (tmp_path_factory.mktemp(name) for name in ("straight", "killed"))
    train(config, str(straight))
    log_train = program._log_train

    def dies(*arguments):
        *_, step, _, _ = arguments
        log_train(*arguments)
        if step == 3:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "_log_train", dies)
        with pytest.raises(Killed):
            train(config, str(killed))
    return straight, config, killed


@pytest.mark.full
def test_a_run_starts_with_the_loss_of_the_checkpoint(folder, data_dir):
    config = restaurants("lora_bdia", folder, data_dir)
    task = load_task(config)
    run = make_program(config, task)
    pretrained = read_params(config, run.abstract)
    state = run.init(pretrained)
    first = run.evaluate(state, task.eval_groups)["loss"]
    model = interop.load(folder, rngs=nnx.Rngs(0))
    model.eval()
    total, count = nnx.jit(task.metrics)(model, task.eval_groups[0], None)["loss"]
    assert float(first) == pytest.approx(float(total.sum() / count.sum()), rel=1e-6)
    other = state | {"frozen": jax.tree.map(lambda leaf: 0.9 * leaf, state["frozen"])}
    assert abs(run.evaluate(other, task.eval_groups)["loss"] - first) > 1e-3


@pytest.mark.full
@pytest.mark.claim("adapters leave all else to the bit")
def test_lora_trains_adapters_and_leaves_all_else_to_the_bit(folder, lora_run):
    workdir, config, _ = lora_run
    state = state_of(workdir, config)
    adapters, frozen = flat(state["params"]), flat(state["frozen"])
    before = params_of(folder)
    assert len(adapters) == 4 and all("lora" in name for name in adapters)
    assert all(bool(np.any(leaf)) for leaf in adapters.values())  # B was zero
    assert frozen.keys() == before.keys()
    assert all(same_bits(frozen[name], before[name]) for name in before)
    # what the optimizer holds is of the adapters alone
    held = sum(leaf.size for leaf in jax.tree.leaves(state["opt_state"]))
    assert held < 2 * sum(leaf.size for leaf in adapters.values()) + 10


@pytest.mark.full
@pytest.mark.claim("resume is bit-equal")
def test_lora_resumes_to_the_bit(lora_run, tmp_path):
    straight, config, killed = lora_run
    shutil.copytree(killed, tmp_path / "run")
    train(config, str(tmp_path / "run"))
    starts = [r["step"] for r in read_records(tmp_path / "run") if r["kind"] == "start"]
    assert starts == [0, 2]
    states = [flat(state_of(workdir, config)) for workdir in (straight, tmp_path / "run")]
    assert all(same_bits(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.full
@pytest.mark.control("adapters leave all else to the bit")
def test_all_is_trained_without_adapters(folder, data_dir, tmp_path):
    config = restaurants("bdia", folder, data_dir, num_steps=2, model={"dropout_rate": 0.0})
    train(config, str(tmp_path / "run"))
    before = params_of(folder)
    after = flat(state_of(tmp_path / "run", config)["params"])
    assert before.keys() == after.keys()
    trained = {name for name in before if not same_bits(before[name], after[name])}
    assert trained == before.keys()
    # two steps of 2e-4: near to where it came from
    assert all(np.max(np.abs(before[name] - after[name])) < 1e-3 for name in before)


def test_texts_without_meanings_start_from_a_checkpoint_too(folder, data_dir):
    config = configure(gpt2_openwebtext, "bdia,smoke", folder, data_dir, input={"length": 16})
    model = nnx.eval_shape(lambda: load_task(config).make_model(nnx.Rngs(0)))
    assert (model.max_len, model.embedding.shape) == (160, (257, 8))  # and not what smoke has


# --- and back ------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.claim("a standard checkpoint is handed back")
def test_an_exported_lora_run_is_a_plain_gpt2(folder, lora_run, tmp_path):
    workdir, _, _ = lora_run
    run, made = open_run(workdir), tmp_path / "out"
    export(workdir, made)
    source, out = (load_file(path / "model.safetensors") for path in (folder, made))
    assert source.keys() == out.keys()
    for name in source:
        assert same_bits(source[name], out[name]) == ("attn.c_attn.weight" not in name), name
    own, exported = (json.loads((each / "config.json").read_text()) for each in (folder, made))
    ends = {"bos_token_id": 256, "eos_token_id": 256}  # of the run's tokenizer
    assert own | {"resid_pdrop": 0.0, "embd_pdrop": 0.0} | ends == exported
    logits = nnx.jit(lambda model: model(TOKENS))
    again = open_run(made).model
    assert_same_bits(logits(again), logits(run.model))
    start = interop.load(folder, rngs=nnx.Rngs(0))
    start.eval()
    assert np.any(logits(start) != logits(again))
    with pytest.raises(ValueError, match="exists and is not empty"):
        export(workdir, made)


def test_a_run_without_a_checkpoint_says_so(folder, data_dir, tmp_path):
    config = restaurants("lora", folder, data_dir)
    path = open_workdir(str(tmp_path / "run"), config)
    keep_description(config, path)
    for made in ((), ("checkpoints",)):  # as before and behind the first step
        for name in made:
            (path / name).mkdir()
        with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
            open_run(path)
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist; .* has to be"):
        open_run(tmp_path / "nothing")


@pytest.fixture
def described(folder, tmp_path):
    """The folder with what such folders have besides, and with code."""
    source = shutil.copytree(folder, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config |= {"eos_token_id": [9, 7], "auto_map": {"AutoConfig": "mine.Config"}}
    (source / "config.json").write_text(json.dumps(config))
    (source / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    for name in ("chat_template.jinja", "LICENSE", "mine.py", "pytorch_model.bin"):
        (source / name).write_text(name)
    Bpe.train(["a text"], 259).save(source / "tokenizer.json")
    return source


ALL = {"LICENSE", "chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json"}


@pytest.mark.parametrize(
    ("tokenizer", "kept", "written", "ends"),
    [
        ("checkpoint", ALL, ALL, ([9, 7], (9, 7, 8))),
        ("gpt2", ALL, ALL, ([9, 7], (9, 7, 8))),
        ("bpe", {"config.json"}, {"config.json", "tokenizer.json"}, (2, None)),
        ("bytes", {"config.json"}, {"config.json"}, (256, None)),
    ],
)
def test_a_run_keeps_and_hands_on_what_surrounds_the_weights(
    described, data_dir, tmp_path, monkeypatch, tokenizer, kept, written, ends
):
    config = restaurants("plain", described, data_dir)
    options = SimpleNamespace(tokenizer_name=tokenizer)
    config: Any = SimpleNamespace(**vars(config) | {"input": options})
    workdir = tmp_path / "run"
    workdir.mkdir()
    for _ in range(2):  # resuming changes nothing
        keep_description(config, workdir)
        assert {path.name for path in (workdir / FOLDER).iterdir()} == kept
        (described / "LICENSE").write_text("another")
    own = {"bytes": Bytes, "bpe": lambda: Bpe.train(["mine"], 259)}
    opened = Run(small_gpt2(), own.get(tokenizer, lambda: SimpleNamespace(end_of_text=9))(), config)
    assert end_tokens(config, opened.tokenizer, workdir / FOLDER) == ends[1]
    monkeypatch.setattr("train.export.open_run", lambda *_: opened)
    export(workdir, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == written | {"model.safetensors"}
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert exported["eos_token_id"] == ends[0] and "auto_map" not in exported
    if "LICENSE" in written:
        assert (tmp_path / "out" / "LICENSE").read_text() == "LICENSE"


# --- images --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    """For images twice as large as the digits, and three classes."""
    folder = tmp_path_factory.mktemp("checkpoint") / "vit"
    make = lambda: ViT(  # noqa: E731
        (16, 16, 1), 3, patch_size=4, width=8, depth=2, num_heads=2, mlp_dim=12, rngs=nnx.Rngs(0)
    )
    interop.save(filled(make), folder)
    return folder


@pytest.mark.full
def test_adapters_of_a_vit_learn_other_classes_of_smaller_images(vit_folder, data_dir, tmp_path):
    changes = {"lora": {"rank": 2}, "num_steps": 2, "train_split": "train[:64]"}
    changes["model"] = {"dropout_rate": 0.0}
    config = configure(vit_digits, "smoke", vit_folder, data_dir, **changes)
    final = train(config, str(tmp_path / "run"))
    assert np.isfinite(final["loss"])
    before = params_of(vit_folder)
    state = state_of(tmp_path / "run", config)
    trained, frozen = flat(state["params"]), flat(state["frozen"])
    head = {"head.kernel", "head.bias"}  # is new, so it has to be learned too
    assert {name for name in trained if "lora" not in name} == head
    assert trained["head.kernel"].shape == (8, 10) and np.any(trained["head.bias"])
    assert frozen.keys() == before.keys() - head
    assert all(same_bits(frozen[name], before[name]) for name in frozen)
    export(tmp_path / "run", tmp_path / "out")
    again = interop.read_architecture(tmp_path / "out").arguments
    assert again["num_classes"] == 10 and again["image_shape"] == (16, 16, 1)


# --- what is refused -----------------------------------------------------------------


def truncate(file):
    file.write_bytes(file.read_bytes()[:-40])


def put_nan(file):
    tensors = load_file(file)
    tensors["transformer.h.1.ln_2.weight"][3] = np.nan
    save_file(tensors, file)


def contents(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "lock"]
    return {path: path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (truncate, "model.safetensors", r"model\.safetensors"),
        (put_nan, "model.safetensors", r"transformer\.h\.1\.ln_2\.weight in .*model\.safetensors"),
        (Path.unlink, "config.json", r"config\.json"),
    ],
)
@pytest.mark.full
@pytest.mark.claim("damage is noticed")
def test_a_damaged_checkpoint_is_named_and_the_workdir_left_alone(
    damage, name, message, folder, lora_run, tmp_path
):
    """A run that is to be resumed, and one that would begin."""
    _, config, killed = lora_run
    before, sound = contents(killed), (folder / name).read_bytes()
    damage(folder / name)
    try:
        for workdir in (killed, tmp_path / "new"):
            with pytest.raises((ValueError, FileNotFoundError), match=message):
                train(config, str(workdir))
    finally:
        (folder / name).write_bytes(sound)
    assert contents(killed) == before
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_that_does_not_fit_is_refused(folder, vit_folder, data_dir, tmp_path):
    few = tmp_path / "few"
    interop.save(small_gpt2(vocab_size=200), few)
    config = restaurants("plain", folder, data_dir)
    for changes, message in (
        ({"init_from": str(few)}, "vocab_size 200, but the tokenizer 'bytes' has 257"),
        ({"init_from": str(vit_folder)}, "is a ViT, which models no text"),
        (
            {"input": replace(config.input, length=161)},
            r"max_len 160, but input\.length asks .*161",
        ),
        ({"input": replace(config.input, tokenizer="checkpoint")}, r"has no tokenizer\.json"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            train(replace(config, **changes), str(tmp_path / "run"))
        assert not (tmp_path / "run").exists()
    images = configure(vit_digits, "smoke", folder, data_dir)
    with pytest.raises(ValueError, match="is a GPT2, which sees no images"):
        train(images, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.full
def test_another_start_is_another_run(lora_run, tmp_path):
    _, config, killed = lora_run
    before = contents(killed)
    with pytest.raises(ValueError, match=r"init_from was '.*gpt2', is '.*other'"):
        train(replace(config, init_from=str(tmp_path / "other")), str(killed))
    with pytest.raises(ValueError, match=r"lora\.rank was 4, is 2"):
        train(replace(config, lora=replace(config.lora, rank=2)), str(killed))
    assert contents(killed) == before


def test_configs_that_cannot_be_fine_tuned_are_refused(folder):
    refused = partial(configure, folder=folder, data_dir="")
    with pytest.raises(ValueError, match="with stack='revnet': a checkpoint is of the standard"):
        refused(vit_digits, "revnet,smoke")
    with pytest.raises(ValueError, match=r"lora\.rank is 4 with model 'resnet'"):
        refused(resnet15_cifar10, "smoke", folder="", lora={"rank": 4})
    for module in (resnet15_cifar10, translation_enfr):
        with pytest.raises(ValueError, match=r"init_from=.*only a ViT and a language model start"):
            refused(module, "smoke")


def test_gamma_is_chosen_by_what_a_run_starts_from(folder, data_dir):
    assert configure(vit_digits, "smoke", "", data_dir).gamma == 0.5
    assert configure(vit_digits, "smoke", folder, data_dir).gamma == 0.0625
    assert configure(vit_digits, "smoke", folder, data_dir, gamma=0.25).gamma == 0.25
    assert configure(gpt2_e2e, "smoke", folder, data_dir).gamma == 0.0625
    assert configure(gpt2_e2e, "bdia,smoke", folder, data_dir).gamma == 0.5  # the paper's
    stack = interop.load(folder, rngs=nnx.Rngs(0)).stack
    assert stack.magnitude == interop.CHECKPOINT_GAMMA == 0.0625
    assert stack(np.ones((2, 4, 8), np.float32)).shape == (2, 4, 8)  # its format has the bits


@pytest.mark.full
def test_a_run_tells_what_its_gamma_does_to_the_checkpoint(folder, data_dir, tmp_path, capsys):
    short = dict(num_steps=2, warmup_steps=1, num_seeds=2)
    config = restaurants("bdia_0.0625", folder, data_dir, **short)
    train(config, str(tmp_path))
    start, first = read_records(tmp_path)[:2]
    at_zero, chosen = start["loss_at_gamma"]["0.0"], start["loss_at_gamma"]["0.0625"]
    assert at_zero != chosen and abs(at_zero - chosen) < 0.1
    # the same draws of gamma and dropout as those of the first step
    np.testing.assert_allclose(first["loss"], chosen, rtol=1e-6)
    said = f"loss of the first batch: {at_zero:.4f} at gamma 0, {chosen:.4f} at 0.0625\n"
    assert said in capsys.readouterr().out
    train(replace(config, keep_last=3), str(tmp_path))  # finished: nothing is told again
    assert "first batch" not in capsys.readouterr().out


@pytest.mark.parametrize("lost", [0.11, np.nan, np.inf])
def test_a_gamma_that_costs_the_checkpoint_much_is_told_with_the_remedy(lost):
    _, said = loss_at_start(lambda gamma: np.float32([1.0, 1.0 + 2 * bool(gamma) * lost]), 0.5)
    assert "loses by so large a gamma. --config.gamma=0.0625 leaves it whole" in said


def test_the_small_gpt2_is_long_enough_for_the_small_experiment():
    small, tiny = gpt2_e2e.get_config("small"), gpt2_openwebtext.get_config("plain,tiny")
    assert small.input.length <= tiny.input.length
