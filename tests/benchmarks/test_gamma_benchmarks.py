"""The benchmarks of what |gamma| does to a checkpoint, a run and a text, at toy size."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy_models import filled

from bdia_jax import interop
from bdia_jax.models.gpt2 import GPT2
from benchmarks import checkpoint, decoding, dial, tables
from train.tasks.data_to_text import Sentences

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("quick_compile")]


def small_gpt2(scale=0.2):
    return filled(
        lambda: GPT2(257, 32, width=8, depth=3, num_heads=2, mlp_dim=12, rngs=nnx.Rngs(0)),
        scale=scale,
    )


def test_a_checkpoint_is_measured_at_every_gamma(tmp_path):
    interop.save(small_gpt2(), tmp_path / "gpt2")
    results = checkpoint.main([str(tmp_path / "gpt2"), "--toy", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "checkpoint.json").read_text())["results"] == results
    assert len(results["largest_state"]) == 4 and results["depth"] == 3
    coarse, fine, exact = (
        results["eval_loss"][name] for name in ("frac_bits_5", "frac_bits_12", "float")
    )
    assert 0 < abs(fine - exact) < abs(coarse - exact) < 0.1
    half, small = (results["gammas"][name] for name in ("0.5", "0.0625"))
    assert (half["side_bits"], small["side_bits"]) == (2, 5)
    for row in (half, small):
        assert row["mismatches"] == 0 and row["elements"] == 2 * 2 * (2 * 16 * 8)
        assert len(set(row["losses"])) == 2  # of two draws
    assert abs(small["loss"] - exact) < abs(half["loss"] - exact)
    assert [*results["half_in"]] == ["first", "middle", "last"]
    # the first block has no gamma: the first third of these three is all 1/16
    assert results["half_in"]["first"]["losses"] == small["losses"]
    assert results["half_in"]["last"]["losses"] != small["losses"]


def test_what_is_not_calibrated_is_told_from_what_is_not_known():
    """Logits three times as large: the loss rises, and all but the temperature is as before."""
    tokens = np.random.default_rng(0).integers(0, 256, (6, 17)).astype(np.int32)
    held_out = Sentences(tokens, np.full(6, 3), np.arange(10, 16))
    model = small_gpt2(scale=1.0)
    before = decoding.by_token(model, held_out, 3)
    model.norm.scale[...] *= 3.0
    model.norm.bias[...] *= 3.0
    after = decoding.by_token(model, held_out, 3)
    assert after["loss"] > before["loss"] and after["entropy"] < before["entropy"]
    assert after["accuracy"] == before["accuracy"]
    assert before["loss_at_it"] < before["loss"]  # random targets: hot is better
    assert before["loss_of_mean_draw"] < before["loss_of_a_draw"]


def test_scores_say_how_long_outputs_are():
    references = [["the mill is a pub by the river", "a pub"], ["it is cheap and near the park"]]
    said = ["the mill is a pub by the river", "it is cheap and near"]
    row = decoding.scores(said, references)
    assert row["length_over_references"] == pytest.approx(13 / 15)
    assert row["brevity_penalty"] == pytest.approx(float(jnp.exp(1 - 15 / 13)))
    assert row["precisions"] == [100.0] * 4 and row["different"] == 1.0


def test_a_difference_to_plain_is_of_the_same_seed():
    """Far smaller than the scatter over seeds, which a difference of means would have."""
    plain, run = (
        {when: {"loss": [1.0 + more, 2.0 + more, 3.0 + more]} for when in ("final", "best")}
        for more in (0.0, 0.25)
    )
    cells = tables.against(plain, run)
    assert cells["final"] == "2.250 ± 1.000"
    assert cells["final_over_plain"] == cells["best_over_plain"] == "+0.2500 ± 0.0000"
    run["final"]["loss"].reverse()  # the control: other seeds beside each other
    assert tables.against(plain, run)["final_over_plain"] == "+0.2500 ± 2.0000"


def test_the_dial_is_drawn_of_the_reports_that_are_there(tmp_path, capsys):
    with pytest.raises(SystemExit):
        dial.main(["--out", str(tmp_path)])
    assert "has none of checkpoint, dial_text_little" in capsys.readouterr().err

    losses = {"bdia_0.5": [3.0, 3.2], "bdia_0.0625": [2.0, 2.2], "plain": [2.1, 2.3]}
    runs = {name: {"final": {"loss": x}, "best": {"loss": x[:1]}} for name, x in losses.items()}
    (tmp_path / "dial_text.json").write_text(json.dumps({"results": runs}))
    dial.main(["--out", str(tmp_path)])
    alone = (tmp_path / "dial.png").stat().st_size
    gammas = {name: {"losses": [3.0, 3.1, 3.2]} for name in ("0.5", "0.125")}
    results = {"gammas": gammas, "eval_loss": {"float": 3.0}}
    document = {"results": results, "config": {"model": "a model"}}
    (tmp_path / "checkpoint.json").write_text(json.dumps(document))
    dial.main(["--out", str(tmp_path)])
    assert (tmp_path / "dial.png").stat().st_size > 1.3 * alone > 10_000  # another panel
