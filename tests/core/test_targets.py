"""Devices to compile for that are not there, and what is refused without their compiler."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from bdia_jax import memory_report
from bdia_jax.compiled import targets

KIB = 1024


@pytest.mark.parametrize("name", targets.TARGETS)
def test_a_description_has_every_figure(name):
    target = targets.TARGETS[name]
    text = target.description
    for figure in (target.cores, target.memory, int(target.bandwidth), target.l2, target.kind):
        assert str(figure) in text
    assert text.count("{") == text.count("}") == 3


def test_an_unknown_device_and_a_program_for_one_already_are_refused():
    with pytest.raises(ValueError, match="device is 'h1000', expected one of a100-40gb, a100, h"):
        memory_report(jnp.sin, jnp.ones(3), device="h1000")
    lowered = jax.jit(jnp.sin).lower(jnp.ones(3))
    with pytest.raises(ValueError, match="Lowered is a program for a device already; pass the fun"):
        memory_report(lowered, device="h100")  # pyright: ignore


def can_compile() -> bool:
    try:
        return bool(targets.devices("h100"))
    except ValueError:
        return False


def test_without_the_compiler_the_extra_is_named():
    if can_compile():
        pytest.skip("it is here")
    with pytest.raises(ValueError, match=r"pip install -e '.\[gpu-plan\]'"):
        memory_report(jnp.sin, jnp.ones(3), device="h100")


@pytest.mark.full
@pytest.mark.parametrize("name", ["a100", "h100", "b200", "rtx4090"])
def test_a_gradient_is_compiled_for_a_gpu(name):
    if not can_compile():
        pytest.skip("needs the extra gpu-plan")
    w = jnp.ones((64, 64), jnp.bfloat16)
    report = memory_report(jax.grad(lambda w: jnp.sum(jnp.sin(w @ w))), w, device=name)
    assert report.arguments == report.outputs == 8 * KIB


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_only_a_gpu_has_options(monkeypatch, platform):
    monkeypatch.setattr(targets, "default_device", lambda: SimpleNamespace(platform=platform))
    assert bool(targets.run_options()) == (platform == "gpu")


def test_the_default_device_is_the_one_compiled_for():
    second = jax.devices("cpu")[-1]
    assert targets.default_device() == jax.devices()[0]
    with jax.default_device(second):
        assert targets.default_device() == second
    with jax.default_device("cpu"):  # pyright: ignore
        assert targets.default_device() == jax.local_devices(backend="cpu")[0]
