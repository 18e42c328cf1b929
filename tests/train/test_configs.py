"""Every experiment runs end to end at its smallest size, and says what it is."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from train.loop.log import read_records
from train.loop.train import train
from train.tasks import open_config

EXPERIMENTS = sorted(
    path.stem for path in Path("configs").glob("*.py") if path.stem not in ("__init__", "common")
)
# one for each kind of model and task; the others have another number in a field of these, or are
# trained elsewhere: ViTs in test_train.py, language models in test_finetune.py
KINDS = ["gpt2_e2e", "translation_enfr", "resnet15_cifar10"]
pytestmark = pytest.mark.usefixtures("quick_compile")


def experiment(name):
    return importlib.import_module(f"configs.{name}")


@pytest.mark.full
@pytest.mark.parametrize("name", KINDS)
def test_smoke(name, tmp_path, data_dir):
    config = experiment(name).get_config("smoke")
    config.data_dir = data_dir
    final = train(open_config(config), str(tmp_path))
    assert np.isfinite(list(final.values())).all()
    records = read_records(tmp_path)
    assert [r["step"] for r in records if r["kind"] == "train"][-1] == config.num_steps
    assert any(r["kind"] == "eval" for r in records)
    assert (tmp_path / "curve.png").exists()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_run_and_scale_is_a_valid_config(name):
    module = experiment(name)
    assert {"smoke"} <= set(module.SCALES)
    assert set(module.PAPER) <= set(module.RUNS)
    assert f"configs/{name}.py" in module.__doc__
    sizes = set()
    for run in module.RUNS:
        for scale in ("", *module.SCALES):
            arg = ",".join(filter(None, (run, scale)))
            sizes.add(open_config(module.get_config(arg)))
    assert len(sizes) == len(module.RUNS) * (1 + len(module.SCALES))  # all differ


def test_unknown_word_lists_the_choices():
    with pytest.raises(ValueError, match=r"no 'huge' in this config; it has bdia, .*smoke"):
        experiment("vit_cifar10").get_config("plain,huge")
    with pytest.raises(ValueError, match="more than one run or scale"):
        experiment("vit_cifar10").get_config("plain,bdia")
