"""Updating in the backward pass: the ordinary path's bits, no gradients, and no silent misuse."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from toy import bits, dropout_block, make_case, perturb, relative_error, tanh_block
from toy_models import SMALL, TOKENS, filled

import bdia_jax.linen
from bdia_jax import bdia_scan, in_backward
from bdia_jax.baselines import RevStack
from bdia_jax.in_backward import per_block, update_in_backward
from bdia_jax.nnx import BDIAStack
from bdia_jax.optim import set_adam

DEPTH, SHAPE = 5, (4, 2, 8)
STACKED = {"stack": True, "head": False}
_, X0, GAMMA = make_case(DEPTH, SHAPE)


def parameters(seed=0):
    params, *_ = make_case(DEPTH, SHAPE, seed)
    head = np.random.default_rng(seed).normal(size=(SHAPE[-1], 3))
    return {"stack": {"w": params["w"], "b": params["b"]}, "head": jnp.asarray(head, jnp.float32)}


def with_keys(params, seed=0):
    return params | {"key": jax.random.split(jax.random.key(seed), DEPTH)}


def loss_fn(params, seed=0, block=dropout_block, x0=X0, **options):
    """Dropout by seed; every parameter has a gradient."""
    gamma = jnp.where(jnp.arange(DEPTH)[:, None] + seed % 2 > 0, GAMMA, -GAMMA).at[0].set(0.0)
    x = bdia_scan(block, with_keys(params["stack"], seed), x0, gamma, **options)
    return jnp.mean(jnp.square(x @ params["head"] - 1.0))


def ordinary(loss, tx, stacked=STACKED, **options):
    """(params, opt_state, *args) -> (loss, params, opt_state)."""
    tx = per_block(tx, stacked, **options)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, *args):
        value, grads = jax.value_and_grad(loss)(params, *args)
        updates, opt_state = tx.update(grads, opt_state, params)
        return value, optax.apply_updates(params, updates), opt_state

    return step


def updating(loss, tx, stacked=STACKED, **options):
    return jax.jit(update_in_backward(loss, tx, stacked, **options), donate_argnums=(0, 1))


def run_both(loss, tx, steps, **options):
    """The trees of both paths, (params, opt_state), and the losses of every step."""
    trees, losses = [], []
    for make in (ordinary, updating):
        step, params, own = make(loss, tx, **options), parameters(), []
        opt_state = per_block(tx, STACKED).init(params)
        for seed in range(steps):
            done = step(params, opt_state, seed)
            value, params, opt_state = (
                done if make is ordinary else (done.loss, done.params, done.opt_state)
            )
            own.append(float(value))
        trees.append((params, opt_state))
        losses.append(own)
    return trees, losses


def different(trees):
    """Names of leaves whose bits are not the same."""
    first, second = map(jax.tree_util.tree_leaves_with_path, trees)
    assert len(first) == len(second)
    return [
        jax.tree_util.keystr(path)
        for (path, a), (_, b) in zip(first, second, strict=True)
        if a.shape != b.shape or (bits(a) != bits(b)).any()
    ]


OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.05, momentum=0.9, nesterov=True),
    "adamw": lambda: optax.adamw(optax.linear_schedule(1e-2, 0.0, 30), weight_decay=0.1),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "set_adam": lambda: set_adam(1e-2),
}


@pytest.mark.full
@pytest.mark.claim("a step in the backward pass is the ordinary step, to the bit")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_and_optimizer_state_are_those_of_the_ordinary_path(name):
    trees, losses = run_both(loss_fn, OPTIMIZERS[name](), 20)
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    assert different(trees) == []


@pytest.mark.full
@pytest.mark.control("a step in the backward pass is the ordinary step, to the bit")
def test_another_gradient_is_seen():
    """What if x_0 were the least bit different, and the optimizer the least bit."""
    tx = OPTIMIZERS["adamw"]()
    state = per_block(tx, STACKED).init(parameters())
    steps = [ordinary(loss_fn, tx), ordinary(partial(loss_fn, x0=X0 * (1 + 2.0**-8)), tx)]
    trees = [step(parameters(), jax.tree.map(jnp.copy, state), 0)[1:] for step in steps]
    assert sum("mu" in name or "nu" in name for name in different(trees)) == 6


def test_it_learns_with_the_plain_optimizers_of_optax_too():
    """per_block changes nothing for an optimizer that goes by elements, nor its state's shapes."""
    tx, params = optax.adam(1e-2), parameters()
    state = per_block(tx, STACKED).init(params).inner_states["blocks"].inner_state
    assert jax.tree.map(jnp.shape, state[0].mu["stack"]) == jax.tree.map(
        jnp.shape, tx.init(params)[0].mu["stack"]
    )
    assert state[0].count.shape == ()


def test_per_block_is_every_block_by_itself():
    """An optimizer that sums over a parameter, against K separate runs of it."""
    tx, stacked = optax.adafactor(1e-2, min_dim_size_to_factor=4), jnp.ones((3, 4, 5)) / 7
    grads = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 5)), jnp.float32)
    whole = per_block(tx)
    updates, _ = jax.jit(whole.update)(grads, whole.init(stacked), stacked)
    for k in range(3):
        alone, _ = jax.jit(tx.update)(grads[k], tx.init(stacked[k]), stacked[k])
        np.testing.assert_allclose(updates[k], alone, rtol=1e-6)
    together, _ = tx.update(grads, tx.init(stacked), stacked)
    assert relative_error(together, updates) > 1e-3


@pytest.mark.full
@pytest.mark.parametrize(
    "options",
    [
        {"batch_chunks": 2, "block": (tanh_block, dropout_block)},
        {"backprop": "remat", "batch_chunks": 2},
        {"backprop": "remat", "fixed_point": None},
    ],
    ids=["in parts", "remat", "remat in floating point"],
)
def test_parts_of_a_block_and_formats(options):
    trees, losses = run_both(partial(loss_fn, **options), optax.adamw(1e-2), 2)
    assert losses[0] == losses[1] and different(trees) == []


@pytest.mark.full
def test_a_plain_stack_without_gamma_is_updated_too():
    """What BDIA is compared with: `jax.checkpoint` around every block, and no gamma."""

    def loss(params, seed):
        stack, options = params["stack"], {"backprop": "remat", "fixed_point": None}
        return jnp.mean(jnp.square(bdia_scan(tanh_block, stack, X0, None, **options)))

    tx, stacked, trees = optax.adamw(1e-2), {"stack": True}, []
    for make in (ordinary, updating):
        params = {"stack": parameters()["stack"]}
        done = make(loss, tx, stacked)(params, per_block(tx, stacked).init(params), 0)
        trees.append(done[1:3] if make is ordinary else (done.params, done.opt_state))
    assert different(trees) == []


@pytest.mark.full
def test_norms_are_those_of_the_gradient():
    grads = jax.jit(jax.grad(loss_fn))(parameters(), 0)
    tx = optax.adamw(1e-2)
    params = parameters()
    done = updating(loss_fn, tx)(params, per_block(tx, STACKED).init(params), 0)
    for name in ("w", "b"):
        expected = jnp.linalg.norm(grads["stack"][name].reshape(DEPTH, -1), axis=1)
        np.testing.assert_allclose(done.norms["stack"][name], expected, rtol=1e-5)
    np.testing.assert_allclose(done.norms["head"], jnp.linalg.norm(grads["head"]), rtol=1e-5)
    assert bool(done.taken) and not np.any(done.failures["blocks"])


@pytest.mark.full
def test_on_a_mesh_that_splits_parameters_and_batch():
    if jax.device_count() < 4:
        pytest.skip("needs four devices")
    types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=types, devices=jax.devices()[:4])

    def placed(tree, spec):
        def place(leaf):
            split = spec if leaf.ndim == 3 else jax.P()
            return jax.device_put(leaf, jax.NamedSharding(mesh, split))

        return jax.tree.map(place, tree)

    tx, trees = optax.adamw(1e-2), []
    x0 = jax.device_put(X0, jax.NamedSharding(mesh, jax.P("data")))
    for make in (ordinary, updating):
        params = placed(parameters(), jax.P(None, "fsdp"))
        state = placed(per_block(tx, STACKED).init(params), jax.P(None, "fsdp"))
        done = make(partial(loss_fn, block=tanh_block, x0=x0), tx)(params, state, 0)
        trees.append(done[1:3] if make is ordinary else (done.params, done.opt_state))
        assert "fsdp" in str(trees[-1][0]["stack"]["w"].sharding.spec)
    for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# --- what is held ------------------------------------------------------------------------

WIDE = 64


def wide_loss(params, x0):
    x = bdia_scan(lambda p, x: jnp.tanh(x @ p), params, x0, jnp.zeros((6, 1)).at[1:].set(0.5))
    return jnp.mean(x**2)


def compiled_wide(step, tx):
    params = jnp.ones((6, WIDE, WIDE)) / WIDE
    lowered = step.lower(params, per_block(tx).init(params), jnp.ones((2, WIDE)))
    return lowered.compile()


def makers(text):
    """The opcodes that make an array [6, WIDE, WIDE]."""
    found = re.findall(rf"= f32\[6,{WIDE},{WIDE}\]\S* ([a-z-]+)\(", text)
    return {opcode for opcode in found if opcode not in ("parameter", "get-tuple-element")}


@pytest.mark.claim("gradients of all blocks never exist together")
@pytest.mark.control("gradients of all blocks never exist together")
def test_no_array_of_all_gradients_is_made_and_all_are_updated_in_place():
    tx = optax.adam(1e-3)
    held = compiled_wide(updating(wide_loss, tx, True), tx)
    # in place: of an array of all blocks nothing is made but slices that take another's place
    assert makers(held.as_text()) <= {"fusion", "dynamic-update-slice", "bitcast"}
    usual = compiled_wide(ordinary(wide_loss, tx, True), tx)
    assert makers(usual.as_text()) & {"broadcast", "copy"}  # the place of the gradients
    sizes = [program.memory_analysis().temp_size_in_bytes for program in (held, usual)]
    one = 4 * WIDE * WIDE
    assert sizes[1] > 6 * one  # the gradients
    assert sizes[0] < 6 * one + 2**16  # of one block: its old and new parameters and moments


# --- clipping, and steps that are not finite ----------------------------------------------


@pytest.mark.full
def test_clipping_by_the_global_norm_is_that_of_the_ordinary_path():
    trees, _ = run_both(loss_fn, optax.sgd(0.5), 3, max_norm=1e-2)
    for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    moved = optax.global_norm(jax.tree.map(jnp.subtract, trees[1][0], parameters()))
    assert 0 < moved < 0.5 * 3 * 1e-2 * 1.001


def test_the_clipped_step_is_clipped_before_the_optimizer():
    expected = optax.chain(optax.clip_by_global_norm(1e-2), optax.sgd(0.5))
    params = parameters()
    grads = jax.jit(jax.grad(loss_fn))(params, 0)
    updates, _ = expected.update(grads, expected.init(params), params)
    want = optax.apply_updates(params, updates)
    done = updating(loss_fn, optax.sgd(0.5), max_norm=1e-2)(
        params, per_block(optax.sgd(0.5), STACKED).init(params), 0
    )
    for a, b in zip(jax.tree.leaves(done.params), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


DRIFT = np.zeros(DEPTH, np.float32)
DRIFT[2] = 0.5  # block 2 comes back different, so that x_1 is rebuilt wrongly


def drifting_loss(params, seed=0, drift=DRIFT):
    block = perturb(tanh_block)
    stack = params["stack"] | {"eps": drift}
    x = bdia_scan(block, stack, X0, GAMMA)
    return jnp.mean(jnp.square(x @ params["head"])) + 0 * seed


@pytest.mark.claim("an update by an unproven gradient is not made in silence")
@pytest.mark.parametrize("if_finite", [True, False])
def test_a_wrong_rebuild_is_told_and_no_block_below_it_is_changed(if_finite):
    tx, before = optax.adamw(0.1), jax.device_get(parameters())
    params = parameters()
    step = updating(drifting_loss, tx, if_finite=if_finite)
    done = step(params, per_block(tx, STACKED).init(params), 0)
    assert not done.taken and np.isfinite(done.loss)
    assert done.failures["blocks"].any()
    after = jax.device_get(done.params)
    changed = (after["stack"]["w"] != before["stack"]["w"]).any((1, 2))
    assert changed.tolist() == ([False] * 5 if if_finite else [False, False, True, True, True])
    assert (bits(after["head"]) == bits(before["head"])).all()
    counts = [leaf for leaf in jax.tree.leaves(done.opt_state) if leaf.dtype == jnp.int32]
    assert counts and not any(map(int, counts))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(done.params))


@pytest.mark.control("an update by an unproven gradient is not made in silence")
def test_a_step_that_is_taken_goes_by_the_same_two_passes():
    tx, params = optax.adamw(0.1), parameters()
    step = updating(partial(drifting_loss, drift=0 * DRIFT), tx, if_finite=True)
    done = step(params, per_block(tx, STACKED).init(params), 0)
    assert done.taken and not done.failures["blocks"].any()
    assert (done.params["stack"]["w"] != parameters()["stack"]["w"]).any((1, 2)).all()


# --- misuse ------------------------------------------------------------------------------


def refused(loss, match, tx=None, stacked=STACKED):
    tx = tx or optax.sgd(0.1)
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(update_in_backward(loss, tx, stacked), parameters(), _states(tx, stacked), 0)


def _states(tx, stacked):
    return jax.eval_shape(per_block(tx, stacked).init, parameters())


def test_a_penalty_on_held_parameters_is_refused():
    refused(lambda p, seed: loss_fn(p) + jnp.sum(p["stack"]["w"]), "something else than its stack")


def test_a_stack_that_is_used_twice_is_refused():
    refused(lambda p, seed: loss_fn(p) + loss_fn(p), "used by two calls of bdia_scan")


def test_a_stack_that_is_not_used_is_refused():
    refused(lambda p, seed: jnp.sum(p["head"] ** 2), "used by no bdia_scan")


def test_a_part_of_a_stack_is_refused():
    def loss(p, seed):
        return jnp.sum(bdia_scan(lambda k, x: x * k["b"], {"b": p["stack"]["b"]}, X0, GAMMA))

    refused(loss, "has 1 of the 2 parameters")


def test_inference_and_other_backprops_are_refused():
    refused(lambda p, seed: loss_fn(p, backprop="store"), "backprop='store'")
    refused(
        lambda p, seed: jnp.sum(bdia_scan(tanh_block, p["stack"], X0, None)) + jnp.sum(p["head"]),
        "gamma=None",
    )


@pytest.mark.full
@pytest.mark.claim("a stack that is run several times in a step is not updated in silence")
@pytest.mark.control("a stack that is run several times in a step is not updated in silence")
@pytest.mark.parametrize("wrap", ["scan", "vmap", "scanned once"])
def test_a_stack_that_runs_several_times_makes_the_loss_nan(wrap):
    def loss(p, seed):
        def one(scale):
            return loss_fn(p, x0=X0 * scale)

        if wrap == "vmap":
            return jnp.mean(jax.vmap(one)(jnp.ones(3)))
        times = 1 if wrap == "scanned once" else 3
        return jax.lax.scan(lambda sum, s: (sum + one(s), None), 0.0, jnp.ones(times))[0]

    tx, params = optax.sgd(0.1), parameters()
    done = updating(loss, tx)(params, per_block(tx, STACKED).init(params), 0)
    assert np.isnan(done.loss) == (wrap != "scanned once")
    assert bool(done.taken) == (wrap == "scanned once")


REFUSED = {
    "global norm": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    "only if finite": lambda: optax.apply_if_finite(optax.sgd(0.1), 3),
    "prodigy": lambda: optax.contrib.prodigy(1.0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_optimizer_that_couples_parameters_is_refused_with_the_remedy(name):
    with pytest.raises(ValueError, match=r"from the gradient of .* max_norm="):
        per_block(REFUSED[name](), STACKED).init(parameters())


def test_one_parameter_alone_does_not_hide_that_blocks_are_coupled():
    with pytest.raises(ValueError, match="from the gradient of"):
        per_block(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))).init(
            jnp.ones((3, 4))
        )


def test_another_state_of_the_optimizer_is_refused():
    tx = optax.sgd(0.1)
    with pytest.raises(
        ValueError, match=r"expected the state of these .* per_block\(tx, stacked\)"
    ):
        update_in_backward(loss_fn, tx, STACKED)(parameters(), tx.init(parameters()), 0)


def test_a_stack_cannot_have_the_name_of_the_rest():
    with pytest.raises(ValueError, match="named 'rest'"):
        per_block(optax.sgd(0.1), {"stack": "rest", "head": False})


def test_a_state_of_integers_that_depend_on_gradients_is_refused():
    with pytest.raises(ValueError, match=r"state has bool\[\] that depends on gradients"):
        per_block(optax.chain(optax.zero_nans(), optax.sgd(0.1)), STACKED).init(parameters())


@pytest.mark.full
def test_accumulation_over_steps_is_taken():
    """`optax.MultiSteps` keeps gradients in its state: of no use here, and right."""
    trees, _ = run_both(loss_fn, optax.MultiSteps(optax.adam(1e-2), 2), 4)
    for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# --- Flax --------------------------------------------------------------------------------


def nnx_loss(model, tokens):
    features = model.features(tokens[:, :-1])
    return jnp.mean(model.loss(features, tokens[:, 1:]))


@pytest.mark.full
@pytest.mark.parametrize("wrt", ["all", "adapters"])
def test_gpt2_with_tied_embeddings_dropout_and_adapters(wrt):
    from bdia_jax import lora

    kind, arguments, _ = SMALL["gpt2"]

    def make():
        model = kind(**arguments | {"dropout_rate": 0.1}, stack=BDIAStack, rngs=nnx.Rngs(0))
        if wrt == "adapters":
            lora.add(model, lora.query_and_value(model), rank=2, alpha=4.0, rngs=nnx.Rngs(1))
        return model

    states, trained = [], nnx.Param if wrt == "all" else nnx.LoRAParam
    for in_place in (False, True):
        model = filled(make)
        optimizer = in_backward.Optimizer(model, optax.adamw(1e-2), wrt=trained)

        @nnx.jit
        def step(model, optimizer, in_place=in_place):
            if in_place:
                return optimizer.train_step(model, nnx_loss, TOKENS).loss
            loss, grads = nnx.value_and_grad(nnx_loss, argnums=nnx.DiffState(0, trained))(
                model, TOKENS
            )
            optimizer.update(model, grads)
            return loss

        losses = jnp.stack([step(model, optimizer) for _ in range(3)])
        assert losses[-1] < losses[0]
        states.append((losses, nnx.as_pure(nnx.state((model, optimizer), nnx.Not(nnx.RngState)))))
        assert int(optimizer.step[...]) == 3
    assert different(states) == []


def test_a_baseline_is_refused():
    stack = RevStack(lambda rngs: nnx.Linear(4, 4, rngs=rngs), depth=2, rngs=nnx.Rngs(0))
    optimizer = in_backward.Optimizer(stack, optax.sgd(0.1), wrt=nnx.Param)
    with pytest.raises(ValueError, match="has a RevStack, and only a BDIAStack"):
        optimizer.train_step(stack, lambda stack: jnp.sum(stack(jnp.ones((2, 8)))))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.tanh(nn.Dense(8)(x))


@pytest.mark.full
def test_linen_by_a_function_of_its_parameters():
    stack, x = bdia_jax.linen.BDIAStack(LinenBlock(), depth=3), jnp.ones((2, 8)) / 3
    variables = stack.init(jax.random.key(0), x, deterministic=True)

    def loss(params, seed):
        rngs = {"gamma": jax.random.key(seed)}
        y = stack.apply({"params": params}, x, deterministic=False, rngs=rngs)
        return jnp.mean(y**2)

    trees, tx = [], optax.adamw(1e-2)
    for make in (ordinary, updating):
        params = jax.tree.map(jnp.copy, variables["params"])
        done = make(loss, tx, True)(params, per_block(tx).init(params), 0)
        trees.append(done[1:3] if make is ordinary else (done.params, done.opt_state))
    assert different(trees) == []


@pytest.mark.full
def test_two_stacks_of_one_model():
    kind, arguments, inputs = SMALL["transformer"]

    def loss(model):
        logits = model(*inputs)
        return jnp.mean(jnp.square(logits))

    states = []
    for in_place in (False, True):
        model = filled(lambda: kind(**arguments, stack=BDIAStack, rngs=nnx.Rngs(0)))
        optimizer = in_backward.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, in_place=in_place):
            if in_place:
                return optimizer.train_step(model, loss)._replace(norms=None)
            value, grads = nnx.value_and_grad(loss)(model)
            optimizer.update(model, grads)
            return value

        done = step(model, optimizer)
        if in_place:
            assert sorted(done.failures) == ["decoder.blocks", "encoder.blocks"] and done.taken
            done = done.loss
        states.append((done, nnx.as_pure(nnx.state((model, optimizer), nnx.Not(nnx.RngState)))))
    assert different(states) == []
