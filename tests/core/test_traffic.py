"""What a compiled program moves and multiplies, counted in programs written by hand."""

import jax
import jax.numpy as jnp
import pytest

from bdia_jax.compiled import targets
from bdia_jax.compiled.hlo import read
from bdia_jax.compiled.traffic import total, work

KIB = 1024
PROGRAM = """HloModule by_hand, entry_computation_layout={()->f32[8]}

%body (carry: (s32[], f32[64,16], bf16[16,16])) -> (s32[], f32[64,16], bf16[16,16]) {
  %carry = (s32[], f32[64,16], bf16[16,16]) parameter(0)
  %index = s32[] get-tuple-element(%carry), index=0
  %rows = f32[64,16] get-tuple-element(%carry), index=1
  %w = bf16[16,16] get-tuple-element(%carry), index=2
  %product = bf16[16,16] dot(%w, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %updated = f32[64,16] fusion(%rows, %index, %product), kind=kLoop, calls=%fused
  %called = (f32[16,16], s8[4096]) custom-call(%product, %w), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  ROOT %next = (s32[], f32[64,16], bf16[16,16]) tuple(%index, %updated, %product)
}

%condition (carry: (s32[], f32[64,16], bf16[16,16])) -> pred[] {
  %carry = (s32[], f32[64,16], bf16[16,16]) parameter(0)
  ROOT %goes_on = pred[] constant(true)
}

%fused (rows: f32[64,16], index: s32[], one: bf16[16,16]) -> f32[64,16] {
  %rows = f32[64,16] parameter(0)
  %index = s32[] parameter(1)
  %one = bf16[16,16] parameter(2)
  %wide = f32[16,16] convert(%one)
  %zero = s32[] constant(0)
  ROOT %update = f32[64,16] dynamic-update-slice(%rows, %wide, %index, %zero)
}

ENTRY %main (x: f32[64,16], w: bf16[16,16]) -> f32[64,16] {
  %x = f32[64,16] parameter(0)
  %w = bf16[16,16] parameter(1)
  %start = s32[] constant(0)
  %copied = f32[64,16] copy(%x)
  %init = (s32[], f32[64,16], bf16[16,16]) tuple(%start, %copied, %w)
  %loop = (s32[], f32[64,16], bf16[16,16]) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %out = f32[64,16] get-tuple-element(%loop), index=1
}
"""  # noqa: E501


@pytest.mark.claim("bytes and products are those of every time")
def test_a_program_by_hand():
    found = {each.name: each for each in work(read(PROGRAM))}
    read_and_written = {name: (each.read, each.written) for name, each in found.items()}
    assert read_and_written == {
        "copied": (4 * KIB, 4 * KIB),
        "product": (2 * 512, 512),  # both operands are read, as the one they are, twice
        "updated": (512 + 4, KIB),  # the product, an index; the update, not what it is put into
        "called": (512 + 512, KIB),  # without its work space
    }
    assert {name: each.times for name, each in found.items()} == {
        "copied": 1,
        "product": 3,
        "updated": 3,
        "called": 3,
    }
    flops = 2 * 16**3
    assert [(found[name].flops, found[name].dtype) for name in ("product", "called", "copied")] == [
        (flops, "bf16"),
        (flops, "bf16"),
        (0, ""),
    ]
    assert total(found.values(), targets.TARGETS["h100"])[:3] == (
        10,
        8 * KIB + 3 * (1536 + 1540 + 2 * KIB),
        6 * flops,
    )


@pytest.mark.control("bytes and products are those of every time")
def test_control_a_loop_that_does_not_say_how_often_counts_once():
    found = work(read(PROGRAM.replace("known_trip_count", "forgotten")))
    assert {each.times for each in found} == {1}


def test_the_bound_is_bandwidths_or_the_products():
    target = targets.TARGETS["h100"]
    *_, product = (each for each in work(read(PROGRAM)) if each.name == "product")
    by_bandwidth = 3 * 1536 / target.bandwidth
    assert product.seconds(target) == pytest.approx(by_bandwidth)
    busy = product._replace(flops=10**12)
    assert busy.seconds(target) == pytest.approx(3 * 10**12 / target.flops["bf16"])
    assert busy._replace(dtype="f32").seconds(target) == pytest.approx(3e12 / 495e12)


def test_attention_is_two_products_forward_and_five_backward():
    call = (
        "  ROOT %attended = (bf16[2,3,8,16]{3,1,2,0}, f32[2,3,8]{2,1,0}) custom-call(%q, %k, %k), "
        'custom_call_target="__cudnn$fmhaSoftmax"'
    )
    text = "\n".join(
        [
            "HloModule attention",
            "",
            "ENTRY %main (q: bf16[2,8,3,16], k: bf16[2,6,3,16]) -> bf16[2,3,8,16] {",
            "  %q = bf16[2,8,3,16]{3,2,1,0} parameter(0)",
            "  %k = bf16[2,6,3,16]{3,2,1,0} parameter(1)",
            call,
            "}",
        ]
    )
    (forward,) = work(read(text))
    (backward,) = work(read(text.replace("fmhaSoftmax", "fmhaSoftmaxBackward")))
    assert forward.flops == 2 * 2 * (2 * 3 * 8 * 6 * 16) and 2 * backward.flops == 5 * forward.flops


def test_what_runs_here_is_read_too():
    """A control of the format: another XLA writes what the one above was written after."""
    compiled = jax.jit(lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, length=5)[0])
    found = work(read(compiled.lower(jnp.ones((64, 16))).compile().as_text() or ""))
    assert max(each.times for each in found) == 5
    assert any((each.read, each.written) == (4 * KIB, 4 * KIB) for each in found)
