"""Which kernels of a forward loop have a twin in the reverse loop, in programs written by hand."""

import pytest

from bdia_jax.compiled import targets
from bdia_jax.compiled.hlo import read
from benchmarks import gpu_loops

PRODUCT = 'custom_call_target="__cublas$lt$matmul", backend_config={{"algorithm":"{}"}}'
PROGRAM = """HloModule by_hand

%sum (a: f32[8,8]) -> f32[8] {{
  %a = f32[8,8] parameter(0)
  ROOT %reduced = f32[8] reduce(%a), dimensions={{1}}
}}

%forward (c: (f32[8,8], s32[8,8])) -> (f32[8,8], s32[8,8]) {{
  %c = (f32[8,8], s32[8,8]) parameter(0)
  %x = f32[8,8] get-tuple-element(%c), index=0
  %n = s32[8,8] get-tuple-element(%c), index=1
  %h.1 = f32[8,8] custom-call(%x, %x), PRODUCT0, metadata={{op_name="there"}}
  %mean.1 = f32[8] fusion(%h.1), kind=kInput, calls=%sum
  %state = s32[8,8] custom-call(%n), custom_call_target="of the recurrence"
  ROOT %next = (f32[8,8], s32[8,8]) tuple(%h.1, %state)
}}

%reverse (c: (f32[8,8], s32[8,8])) -> (f32[8,8], s32[8,8]) {{
  %c = (f32[8,8], s32[8,8]) parameter(0)
  %y = f32[8,8] get-tuple-element(%c), index=0
  %m = s32[8,8] get-tuple-element(%c), index=1
  %h.2 = f32[8,8] custom-call(%y, %y), PRODUCT1, metadata={{op_name="here"}}
  %mean.2 = f32[8] fusion(%h.2), kind=kInput, calls=%sum
  ROOT %next = (f32[8,8], s32[8,8]) tuple(%h.2, %m)
}}

%goes_on (c: (f32[8,8], s32[8,8])) -> pred[] {{
  %c = (f32[8,8], s32[8,8]) parameter(0)
  ROOT %true = pred[] constant(true)
}}

ENTRY %main (x: (f32[8,8], s32[8,8])) -> (f32[8,8], s32[8,8]) {{
  %x = (f32[8,8], s32[8,8]) parameter(0)
  %first = (f32[8,8], s32[8,8]) while(%x), condition=%goes_on, body=%forward
  ROOT %second = (f32[8,8], s32[8,8]) while(%first), condition=%goes_on, body=%reverse
}}
"""


def twins(first: str, second: str) -> dict[str, list[str]]:
    text = PROGRAM.replace("PRODUCT0", PRODUCT).replace("PRODUCT1", PRODUCT).format(first, second)
    found = gpu_loops.twins(read(text))
    assert {kind: row["kernels"] for kind, row in found.items()} == {
        "products": 1,
        "attention": 0,
        "reductions": 1,
        "elementwise": 0,
    }
    return {kind: row["without_twin"] for kind, row in found.items()}


@pytest.mark.claim("kernels of both loops are compared")
def test_the_same_kernels_under_other_names_are_twins():
    assert not any(twins("5", "5").values())


@pytest.mark.control("kernels of both loops are compared")
def test_control_another_algorithm_is_none():
    assert twins("5", "6")["products"] == ["h.1"]


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_and_attention_are_the_same_on_an_h100(tmp_path, dtype):
    try:
        targets.devices("h100")
    except ValueError as error:
        pytest.skip(str(error))
    results = gpu_loops.main(["--toy", "--out", str(tmp_path)])
    for block in gpu_loops.BLOCKS:
        for kind in ("products", "attention"):
            assert results[block][dtype][kind]["without_twin"] == []
