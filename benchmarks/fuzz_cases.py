"""Command lines and configs that are wrong in one way or another, each made from a number.

The file is over 300 lines because the cases of all programs share what they are made of.
"""

import functools
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from train.run.experiment import load_experiment

CONFIGS = Path(__file__).parent.parent / "configs"
# What a person, a script or a damaged file may put where a value is expected.
_WORDS = """
    abc 1.5 -1 0 1 2 3 7 1e400 -1e400 nan inf -inf -0.0 0.3 1e-400 1e308 1e9 1000000000
    1000000000000 2147483647 2147483648 -2147483649 () (0,) (1 ((1,),) ('a',) None {} {'depth':0}
    [1] True false 0x10 1_000 ' " -- = [ * .. ~ $HOME a/b - %s {0} ä 日本 train train[:10]
"""
TEXTS = (*_WORDS.split(), "9" * 40, "9" * 5000, "x" * 5000, "(" * 300, "(-1, 2)", "(1, 2)")
TEXTS += ("", " ", "\n", "\0", "a\0b", "\ud800", "{'a': 1}")
_NUMBER_LIKE = TEXTS[:24]
VALUES: tuple[Any, ...] = (None, True, False, 0, 1, -1, 2, 3, 1.5, -0.0, 10**9, 10**12, 2**31 - 1)
VALUES += (2**31, 10**400, 10**5000, float("nan"), float("inf"), 1e308, "", "abc", "\0", "\ud800")
VALUES += ("x" * 5000, "1", (), (1, 2), (0,), ("a",), ((1,),), [1], [None], {}, {"a": 1}, {1: 2})
VALUES += (b"x", 1j, object)
# Values that some field takes: two of them may contradict each other.
_SENSIBLE = {
    "dataset": "digits pydoc numbers_enfr restaurants cifar10 e2e digitz",
    "train_split": "train train[:50] train[:0] train[:200%] train[5:2] tran [",
    "eval_split": "validation validation[:2] train+validation test all x[ {}",
    "data_dir": f"empty file no/such workdir {'x' * 300} {'x/' * 3000}",
    "task": "images language translation data_to_text image",
    "stack": "bdia revnet midpoint bdai",
    "backprop": "reversible store remat stored",
    "optimizer": "set_adam adamw sgd",
    "schedule": "constant linear cosine",
    "non_finite": "stop skip ignore",
    "init_from": "no/such file workdir empty",
    "model.name": "vit gpt2 transformer resnet pretrained bert",
    "model.dtype": "float32 bfloat16 float16",
    "input.tokenizer": "bytes bpe checkpoint gpt3",
    "input.boundaries": "(8,16) (16,8) (0,) (1,) (16,16) (2,64)",
    "input.inference_gammas": "(0.0,) (0.0,0.5) (0.7,) ()",
    "model.widths": "(8,16) (8,) () (0,8) (7,9) (16,8)",
    "model.depths": "(2,2) (1,) () (0,1) (1,2)",
    "gamma": "0.5 0.25 0.125 0 0.6 1 1e-30",
    "frac_bits": "9 0 1 24 30 31 -3",
    "guard_bits": "-1 0 1 5 7",
    int: "1 2 3 4 5 8 16 0 32",
    float: "0.0 0.1 0.5 0.9 1.0 1e-3 10",
    bool: "True False",
}


class Case(NamedTuple):
    """program: of train/, or "config" (values are a config's fields) or "config.json" (a file).

    arguments: of its command line; {S} stands for the scratch folder.
    values: of a config, nested; or what the file has.
    """

    program: str
    arguments: list[str]
    values: Any = None


def make_case(seed: int) -> Case:
    """The same case for the same number."""
    rng = np.random.default_rng(seed)
    makers = [*_MAKERS]
    weights = np.array([*_MAKERS.values()])
    return makers[rng.choice(len(makers), p=weights / weights.sum())](rng)


def make_tiny(seed: int) -> Case:
    """A command line of `python -m train` at smoke size, with fields that some config has."""
    rng = np.random.default_rng(seed)
    file = pick(rng, "vit_digits gpt2_openwebtext translation_enfr gpt2_e2e")
    run = pick(rng, _experiment(file).RUNS)
    fields = _fields(file)
    arguments = [f"--config={CONFIGS / file}.py:{run},smoke", "--workdir={S}/" + f"w{seed}"]
    for name in rng.choice([*fields], rng.integers(1, 4), replace=False):
        if name not in ("dataset", "data_dir", "init_from"):
            large = fields[name] is int and rng.random() < 0.1
            text = "1000000000" if large else _sensible(rng, name, fields[name])
            arguments.append(f"--config.{name}={text}")
    return Case("train", arguments)


def _train(rng) -> Case:
    file = pick(rng, _files())
    arguments = [f"--config={_config_argument(rng, file)}", f"--workdir={_workdir(rng)}"]
    arguments += _overrides(rng, file)
    if rng.random() < 0.1:
        name = pick(rng, "--coordinator --num_processes --process_id")
        arguments.append(f"{name}={pick(rng, _NUMBER_LIKE)}")
    return Case("train", _spoilt(rng, arguments))


def _sweep(rng) -> Case:
    file = pick(rng, _files())
    argument = f"{CONFIGS / file}.py" if rng.random() < 0.8 else _config_argument(rng, file)
    arguments = [f"--config={argument}", f"--workdir={_workdir(rng)}"]
    arguments += _overrides(rng, file)
    if rng.random() < 0.5:
        arguments.append(f"--scale={pick(rng, ('smoke', 'small', 'smok', *TEXTS[24:34]))}")
    if rng.random() < 0.5:
        arguments.append(f"--runs={pick(rng, 'bdia plain bdai bdia,plain , []')}")
    return Case("sweep", _spoilt(rng, arguments))


def _config(rng) -> Case:
    """A config as a program may make it: any Python value in any field."""
    values = _flat_values(pick(rng, _files()))
    spoil(rng, values, VALUES)
    return Case("config", [], _nested(values))


def _config_json(rng) -> Case:
    """A config.json: fields changed, or bytes of it."""
    values = _flat_values(pick(rng, _files()))
    plain = [v for v in VALUES if isinstance(v, bool | int | float | str | list | dict | None)]
    spoil(rng, values, [v for v in plain if v not in (10**5000, {1: 2})])
    data = bytearray(json.dumps(values).encode())
    kind = rng.integers(4)
    if kind == 0:
        del data[rng.integers(len(data)) :]
    elif kind == 1:
        for place in rng.integers(len(data), size=rng.integers(1, 4)):
            data[place] ^= 1 << rng.integers(8)
    elif kind == 2 and rng.random() < 0.3:
        data = bytearray(pick(rng, (b"", b"[]", b"3", b"null", b'"x"', b"{}", b"[" * 100_000)))
    return Case("config.json", [], bytes(data))


def _sweep_all(rng) -> Case:
    arguments = ["--all", "--out={S}/out", "--workdir={S}/all"]
    if rng.random() < 0.5:
        arguments += ["--scale", pick(rng, ("smoke", "", "small", "smok", *_NUMBER_LIKE))]
    fields = _fields("vit_digits")
    arguments += [
        "--set=" + pick(rng, ("", "x", pick(rng, fields) + "=")) + pick(rng, TEXTS)
        for _ in range(rng.integers(0, 3))
    ]
    return Case("sweep", _spoilt(rng, arguments))


def _launch(rng) -> Case:
    arguments = [f"--processes={pick(rng, TEXTS)}", f"--devices={pick(rng, _NUMBER_LIKE)}"]
    return Case("launch", _spoilt(rng, arguments[: rng.integers(0, 3)]))


def _report(rng) -> Case:
    return Case("report", _spoilt(rng, [_folder(rng), f"--out={_folder(rng)}"]))


def _prepare(rng) -> Case:
    names = ("cifar10", "cifar100", "kaggle_enfr", "openwebtext_sample", "e2e", "digits")
    arguments = [pick(rng, (*names, *TEXTS)), f"--from={_folder(rng)}"]
    arguments += [f"--data_dir={_folder(rng)}"] * bool(rng.integers(2))
    return Case("prepare", _spoilt(rng, [*arguments, *["--unverified"] * bool(rng.integers(2))]))


def _generate(rng) -> Case:
    arguments = [f"--from={_folder(rng)}", f"--prompt={pick(rng, TEXTS)}"]
    options = ("num_tokens", "temperature", "top_k", "seed", "beam_size", "length_penalty")
    options += ("no_repeat_ngram", "tokenizer", "source", "prompt_file", "data_dir")
    arguments += [f"--{pick(rng, options)}={pick(rng, TEXTS)}" for _ in range(rng.integers(3))]
    return Case("generate", _spoilt(rng, arguments))


def _evaluate(rng) -> Case:
    options = ("dataset", "split", "tokenizer", "length", "batch_size", "frac_bits", "out")
    changes = [f"--{pick(rng, options)}={pick(rng, TEXTS)}" for _ in range(rng.integers(3))]
    return Case("evaluate", _spoilt(rng, [f"--from={_folder(rng)}", *changes]))


def _export(rng) -> Case:
    return Case("export", _spoilt(rng, [f"--from={_folder(rng)}", f"--to={_folder(rng)}"]))


def _files() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*_*.py") if path.stem[0] != "_")


@functools.cache
def _experiment(file: str) -> Any:
    return load_experiment(str(CONFIGS / f"{file}.py"))


def _flat_values(file: str) -> dict[str, Any]:
    """name -> value of every field of an experiment."""
    return flatten_dict(_experiment(file).get_config().to_dict(), sep=".")


def _fields(file: str) -> dict[str, type]:
    return {name: type(value) for name, value in _flat_values(file).items()}


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *where, field = [part for part in name.split(".") if part]  # a ConfigDict takes no dots
        place = nested.setdefault(where[0], {}) if where else nested
        if isinstance(place, dict):
            place[field] = value
    return nested


def spoil(rng, values: dict[str, Any], others: Any) -> None:
    """Changes, removes, renames or adds fields."""
    for _ in range(rng.integers(1, 4)):
        if not values:
            return
        name = pick(rng, values)
        kind = rng.integers(8)
        if kind == 0:
            del values[name]
        elif kind == 1:
            values[misspelt(rng, name)] = values.pop(name)
        elif kind == 2:
            values[name.split(".")[0]] = pick(rng, others)
        else:
            values[name] = pick(rng, others)


def _config_argument(rng, file: str) -> str:
    path = f"{CONFIGS / file}.py"
    experiment = _experiment(file)
    words = [pick(rng, experiment.RUNS), pick(rng, experiment.SCALES)]
    kind = rng.integers(12)
    if kind == 0:
        words[0] = misspelt(rng, words[0])
    elif kind == 1:
        words = [pick(rng, TEXTS)]
    elif kind == 2:
        words += words
    elif kind == 3:
        files = "{S}/no.py {S}/file {S} {S}/broken.py {S}/raises.py {S}/none.py"
        path = pick(rng, (pick(rng, files), misspelt(rng, path), pick(rng, TEXTS)))
    elif kind < 6:
        return path
    return f"{path}:{','.join(words)}"


def _overrides(rng, file: str) -> list[str]:
    fields, changes = _fields(file), []
    for _ in range(rng.choice(4, p=(0.1, 0.4, 0.3, 0.2))):
        name = pick(rng, fields)
        kind = rng.integers(10)
        text = _sensible(rng, name, fields[name])
        if kind == 0:
            name = misspelt(rng, name)
        elif kind == 1:
            name = pick(rng, "model input mesh lora . model. a.b.c model.x")
        if kind in (1, 2, 3, 4):
            text = pick(rng, TEXTS)
        changes += pick(rng, ([f"--config.{name}={text}"] * 1, [f"--config.{name}", text]))
    return changes


def _sensible(rng, name: Any, kind: Any) -> str:
    known = _SENSIBLE.get(name) or _SENSIBLE.get(kind)
    return pick(rng, known or TEXTS)


def _folder(rng) -> str:
    """Where a folder or a file is expected."""
    known = "./ empty file no/such workdir sweep others damaged file/below"
    return pick(rng, TEXTS) if rng.random() < 0.2 else "{S}/" + pick(rng, known)


def _workdir(rng) -> str:
    return f"{{S}}/new{rng.integers(10**9)}" if rng.random() < 0.7 else _folder(rng)


def _spoilt(rng, arguments: list[str]) -> list[str]:
    """Sometimes an argument more, fewer, misspelt or in another place."""
    arguments, kind = [*arguments], rng.integers(14)
    place = int(rng.integers(len(arguments) + 1))
    if kind == 0:
        more = "--workdri=x x -- - --= --config. --no --flagfile={S}/no --config --flagfile={S}"
        arguments.insert(place, pick(rng, ("", pick(rng, more), "--undefok=x")))
    elif kind == 1 and arguments:
        del arguments[min(place, len(arguments) - 1)]
    elif kind == 2 and arguments:
        place = min(place, len(arguments) - 1)
        arguments[place] = misspelt(rng, arguments[place])
    elif kind == 3:
        arguments.reverse()
    return [re.sub("^--(pdb|run_with|help|profile)", "--x", argument) for argument in arguments]


def misspelt(rng, word: str) -> str:
    if not word:
        return "x"
    place = int(rng.integers(len(word)))
    kind = rng.integers(3)
    letter = word[place]
    return word[:place] + ("", letter * 2, "_")[kind] + word[place + 1 :]


def pick(rng, choices: Any) -> Any:
    """One of several, or of the words of a text."""
    choices = choices.split() if isinstance(choices, str) else [*choices]
    return choices[int(rng.integers(len(choices)))]


# How often each is made.
_MAKERS = {_train: 9, _sweep: 3, _sweep_all: 1, _config: 6, _config_json: 3, _launch: 1}
_MAKERS |= {_report: 1, _prepare: 1, _generate: 1, _evaluate: 1, _export: 1}
