"""Guard bits that a run chooses by an audit, once, before it is compiled."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from toy_models import filled
from toy_runs import guard_bits_built

from bdia_jax import FixedPoint
from bdia_jax.audit import Audit
from bdia_jax.nnx import BDIAStack
from configs import translation_enfr, vit_digits
from train.loop import guard_bits
from train.loop import train as training
from train.loop.log import read_records
from train.tasks import load_task, open_config

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("quick_compile")]


def make_config(module, data_dir, **changes):
    config = module.get_config("smoke").unlock()
    config.update({"data_dir": data_dir, "guard_bits": -1, "num_steps": 2, "warmup_steps": 1})
    config.update(changes)
    return open_config(config.lock())


def finds(guard_bits, calls):
    """In place of `BDIAStack.choose_guard_bits`, which compiles for long."""

    def choose(stack, x, *consts, at_least, rngs):
        assert at_least == 1
        calls.append((x.shape, [leaf.shape for leaf in jax.tree.leaves(consts)]))
        one = np.zeros(1)
        found = FixedPoint(guard_bits=guard_bits(stack))
        return Audit(found, x.size, one, one, one, one, 0, 0, 0.75, 0.0, found.guard_bits)

    return choose


def test_the_program_is_compiled_with_the_number_chosen(data_dir, tmp_path, monkeypatch, capsys):
    calls, built = [], guard_bits_built(monkeypatch)
    monkeypatch.setattr(BDIAStack, "choose_guard_bits", finds(lambda _: 2, calls))
    config = make_config(vit_digits, data_dir, model={"dropout_rate": 0.0})
    training.train(config, str(tmp_path))
    assert calls == [((32, 17, 16), [])] and built == [1, 2]
    (start,) = (record for record in read_records(tmp_path) if record["kind"] == "start")
    assert (start["guard_bits"], start["max_drift"], start["audited"]) == (2, 0.75, 32 * 17 * 16)
    assert "guard bits: 2, chosen by an audit of 8,704 rebuilt" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text())["guard_bits"] == -1
    training.train(config, str(tmp_path))  # the same run: finished
    with pytest.raises(ValueError, match="guard_bits was -1, is 2"):
        training.train(replace(config, guard_bits=2), str(tmp_path))


@pytest.mark.parametrize(("largest", "warned"), [(1e5, False), (1e6, True)])
def test_a_run_is_told_that_its_states_near_the_end_of_their_format(data_dir, largest, warned):
    facts = {"guard_bits": 2, "max_drift": 0.5, "audited": 8, "largest": largest}
    said = guard_bits.described(make_config(vit_digits, data_dir), facts)
    assert ("frac_bits=9 has room for states up to 4.19e+06" in said) == warned


def test_every_stack_of_a_model_is_audited_on_its_own_inputs(data_dir, monkeypatch):
    config = make_config(translation_enfr, data_dir, dataset="numbers_enfr")
    task = load_task(config)
    model = filled(lambda: task.make_model(nnx.Rngs(0)))
    inputs = guard_bits.stack_inputs(config, task, model)
    assert set(inputs) == {("encoder",), ("decoder",)}
    x, (mask, memory, memory_mask) = inputs[("decoder",)]
    assert len(x) == len(memory) == config.batch_size and mask.dtype == memory_mask.dtype == bool
    calls = []
    choose = finds(lambda stack: 2 if stack is model.encoder else 4, calls)
    monkeypatch.setattr(BDIAStack, "choose_guard_bits", choose)
    facts = guard_bits.choose(replace(config, batch_chunks=2), task, model)
    assert facts["guard_bits"] == 4
    made = nnx.eval_shape(lambda: guard_bits.with_guard_bits(task, 4).make_model(nnx.Rngs(0)))
    assert made.encoder.fixed_point.guard_bits == made.decoder.fixed_point.guard_bits == 4
    half = config.batch_size // 2
    sizes = [(x[0], [leaf[0] for leaf in consts]) for x, consts in calls]
    assert sizes == [(half, [half] * 3), (half, [half])]  # the decoder first, with its memory


@pytest.mark.parametrize(
    ("changes", "chooses"), [({}, True), ({"guard_bits": 2}, False), ({"backprop": "store"}, False)]
)
def test_only_a_reversible_run_chooses(changes, chooses):
    config = make_config(vit_digits, "", **changes)
    assert config.chooses_guard_bits == chooses
    fixed_point = config.model_arguments["stack"].keywords["fixed_point"]
    assert fixed_point.guard_bits == max(1, config.guard_bits)
    with pytest.raises(ValueError, match="guard_bits is -2, expected at least -1"):
        make_config(vit_digits, "", guard_bits=-2)
