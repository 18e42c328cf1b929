"""The reader of compiled programs: collectives against volumes counted by hand, kernels, loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bdia_jax.compiled.collectives import collectives, of_integers, sent_bytes
from bdia_jax.compiled.hlo import Array, Kernel, read


@pytest.fixture(scope="module")
def mesh():
    if jax.device_count() < 4:
        pytest.skip("needs four devices")
    types = (AxisType.Auto,) * 2
    return jax.make_mesh((2, 2), ("a", "b"), axis_types=types, devices=jax.devices()[:4])


def compiled(fn, *args, **kwargs) -> str:
    return jax.jit(fn, **kwargs).lower(*args).compile().as_text()


def found_in(text):
    return collectives(read(text))


def each(mesh, fn, x):
    """Text of fn, which every device runs on its quarter of x."""
    specs = {"in_specs": P(("a", "b")), "out_specs": P(("a", "b"))}
    return compiled(jax.shard_map(fn, mesh=mesh, check_vma=False, **specs), x)


def test_a_sum_in_a_scan_runs_as_often_as_the_scan(mesh):
    def five(x):
        outer = lambda c, _: (c + jax.lax.psum(c, ("a", "b")), None)  # noqa: E731
        return jax.lax.scan(outer, x, length=5)[0]

    (found,) = found_in(each(mesh, five, jnp.ones((8, 6))))
    assert found.kind == "all-reduce" and found.results == (Array("f32", (2, 6)),)
    assert (found.times, found.in_loop, found.group_size) == (5, True, 4)
    assert "psum" in found.source
    assert sent_bytes([found]) == {"all-reduce": 5 * 2 * 48 * 3 / 4, "total": 360}


def test_scans_in_scans_multiply_and_groups_may_be_parts_of_the_mesh(mesh):
    def inner(x):
        body = lambda c, _: (c + jax.lax.pmax(jnp.sin(c), "b"), None)  # noqa: E731
        return jax.lax.scan(body, x, length=3)[0]

    text = each(mesh, lambda x: jax.lax.fori_loop(0, 2, lambda _, c: inner(c), x), jnp.ones((8, 6)))
    (found,) = found_in(text)
    assert (found.times, found.group_size) == (6, 2)
    # without the compiler's note the condition says it
    assert found_in(text.replace("known_trip_count", "forgotten")) == [found]


def test_all_kinds(mesh):
    def all_of_them(x):  # [4, 6], 96 bytes
        axes = ("a", "b")
        gathered = jax.lax.all_gather(x, axes)
        scattered = jax.lax.psum_scatter(x, axes, tiled=True)
        swapped = jax.lax.all_to_all(x, axes, 0, 0, tiled=True)
        moved = jax.lax.ppermute(x, axes, [(0, 1), (1, 2), (2, 3), (3, 0)])
        return jnp.sum(gathered, 0) + moved, scattered, swapped

    found = found_in(each(mesh, all_of_them, jnp.ones((16, 6))))
    assert sent_bytes(found) == {
        "all-gather": 4 * 96 * 3 / 4,
        "reduce-scatter": 96 * 3 / 4,
        "all-to-all": 96 * 3 / 4,
        "collective-permute": 96,
        "total": 528,
    }
    assert all(not c.in_loop and c.times == 1 for c in found)


def test_the_gradient_of_a_sharded_product(mesh):
    gradient = jax.grad(lambda w, x: jnp.sum(jnp.sin(x @ w)))  # w is 2048 bytes

    def sent(w_spec):
        w_sharding, x_sharding = (NamedSharding(mesh, spec) for spec in (w_spec, P(("a", "b"))))
        w = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=w_sharding)
        x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=x_sharding)
        return sent_bytes(found_in(compiled(gradient, w, x, out_shardings=w_sharding)))

    assert sent(P()) == {"all-reduce": 2 * 2048 * 3 / 4, "total": 3072}
    fsdp = sent(P(("a", "b")))
    assert fsdp.pop("all-gather") == 2048 * 3 / 4
    assert fsdp in ({"all-reduce": 3072, "total": 4608}, {"reduce-scatter": 1536, "total": 3072})
    w, x = jnp.ones((16, 32)), jnp.ones((8, 16))
    assert sent_bytes(found_in(compiled(gradient, w, x))) == {"total": 0}


@pytest.mark.control("no collective carries a state")
def test_integers_in_loops_are_found(mesh):
    def states(n):  # int32 [2, 6]; what must not happen to the states in a scan
        def body(n, _):
            bits = jax.lax.all_gather((n & 3).astype(jnp.uint8), "b")
            return n + jnp.sum(jax.lax.all_gather(n, "a"), 0), bits

        n, packed = jax.lax.scan(body, n, length=3)
        return n + jnp.sum(packed)

    found = found_in(each(mesh, states, jnp.ones((8, 6), jnp.int32)))
    assert {c.results[0].dtype for c in of_integers(found)} == {"s32", "u8"}
    once = found_in(each(mesh, lambda n: jax.lax.psum(n, "a"), jnp.ones((8, 6), jnp.int32)))
    assert not of_integers(once) and len(of_integers(once, in_loop=False)) == 1
    floats = found_in(each(mesh, lambda x: jax.lax.psum(x, "a"), jnp.ones((8, 6))))
    assert floats and not of_integers(floats, in_loop=False)


# what this compiler does not write here, as others do
_TEXT = """HloModule step, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%wrapped (p: f32[4,2]) -> f32[1,2] {
  %p = f32[4,2]{1,0} parameter(0)
  ROOT %scattered = f32[1,2]{1,0} reduce-scatter(%p), replica_groups=[2,4]<=[8], to_apply=%add
}

%taken (q: bf16[8]) -> bf16[8] {
  %q = bf16[8]{0} parameter(0)
  ROOT %r = bf16[8]{0} all-reduce(%q), replica_groups=mesh['i'=2,'j'=4] {'i','j':(1)2}
}

%other (q.1: bf16[8]) -> bf16[8] {
  ROOT %q.1 = bf16[8]{0} parameter(0)
}

ENTRY %main (a: f32[4,2], b: s32[], c: bf16[8]) -> f32[4,2] {
  %a = f32[4,2]{1,0:T(8,128)} parameter(0)
  %b = s32[] parameter(1)
  %c = bf16[8]{0} parameter(2)
  %gather = (f32[4,2]{1,0}, f32[32,2]{1,0:T(8,128)}) all-gather-start(%a), replica_groups={}
  %gathered = f32[32,2]{1,0} all-gather-done(%gather)
  %move = (f32[4,2], f32[4,2], u32[], u32[]) collective-permute-start(%a)
  %moved = f32[4,2]{1,0} collective-permute-done(%move)
  %both = (f32[4,2], /*index=1*/f32[3]{0}) all-reduce(%a, %d), replica_groups={{0,1},{2,3}}
  %scatter = ((f32[4,2]{1,0}), f32[1,2]{1,0}) async-start(%a), calls=%wrapped
  %done = f32[1,2]{1,0} async-done(%scatter), calls=%wrapped
  ROOT %chosen = bf16[8]{0} conditional(%b, %c, %c), branch_computations={%taken, %other}
}
"""


def test_other_ways_to_write_it():
    found = {c.kind + str(c.group_size): c for c in found_in(_TEXT)}
    assert len(found_in(_TEXT)) == 5  # a start and its done are one
    assert found["all-gather8"].sent == 32 * 2 * 4 * 7 / 8
    assert found["collective-permute8"].sent == 4 * 2 * 4
    assert found["all-reduce2"].sent == (32 + 12) * 2 * 1 / 2
    assert found["reduce-scatter4"].sent == 4 * 2 * 4 * 3 / 4
    assert found["all-reduce4"].sent == 8 * 2 * 2 * 3 / 4  # in a branch


def test_a_loop_of_unknown_length_is_an_error_or_told(mesh):
    def until_small(x):
        go_on = lambda c: jnp.sum(c) > 1  # noqa: E731
        return jax.lax.while_loop(go_on, lambda c: jax.lax.pmean(c, ("a", "b")) / 2, x)

    text = each(mesh, until_small, jnp.ones((8, 6)))
    with pytest.raises(ValueError, match="neither a known trip count"):
        found_in(text)
    (told,) = collectives(read(text), unknown=3)  # as of the steps of a training program
    assert told.times == 3
    with pytest.raises(ValueError, match="no entry computation"):
        read("{}")
    assert np.isclose(Array("s4", (3,)).bytes, 2) and Array("f8e4m3fn", (3, 2)).bytes == 6


def test_a_fusion_is_one_kernel_and_the_kernels_of_a_loop_stand_together():
    def scans(x, w):
        inner = lambda c, w_k: (jnp.tanh(c) + w_k.T, None)  # noqa: E731
        outer = lambda c, _: (jax.lax.scan(inner, c, w)[0], None)  # noqa: E731
        return jnp.sin(jax.lax.scan(outer, x, length=2)[0])

    program = read(compiled(scans, jnp.ones((5, 3)), jnp.ones((4, 3, 5))))
    (loop,) = program.loops()
    (added,) = (kernel for kernel in loop if "add" in kernel.ops and kernel.shape == (5, 3))
    assert "tanh" in added.ops and not added.moves
    assert not any("sine" in kernel.ops for kernel in loop)
    assert set(loop) < set(program.kernels())
    (sine,) = (kernel for kernel in program.kernels() if "sine" in kernel.ops)
    assert (sine.dtype, sine.shape) == ("f32", (5, 3))


def test_what_moves():
    for ops, moves in (
        ({"copy"}, True),
        ({"dynamic-slice", "transpose"}, True),
        ({"dynamic-slice"}, False),
        ({"copy", "add"}, False),
    ):
        assert Kernel("f32", (2,), frozenset(ops)).moves == moves
