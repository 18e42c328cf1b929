"""Several CPU devices, so that sharded equals unsharded can be tested; `gpu` tests need a GPU."""

import os
import sys

_FLAG = "--xla_force_host_platform_device_count"
if "jax" not in sys.modules and _FLAG not in os.environ.get("XLA_FLAGS", ""):
    # only the CPU platform reads this; on a GPU it changes nothing
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=4".strip()

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

settings.register_profile("bdia", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("bdia")


def pytest_collection_modifyitems(items):
    if not any(item.get_closest_marker("gpu") for item in items) or _has_gpu():
        return
    skip = pytest.mark.skip(reason=f"needs a GPU; jax found only {jax.devices()[0].platform}")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def _has_gpu() -> bool:
    return jax.default_backend() == "gpu"


@pytest.fixture
def key():
    return jax.random.key(20240709)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Where bundled data sets prepare themselves, once."""
    return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture
def unoptimized():
    """Programs that compile in half the time, for a test that is not about them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")  # and no longer: exactness is tested in optimized programs
def quick_compile(compile_cache):
    """Unoptimized programs, kept for who needs them again: compiling is what tiny runs cost."""
    changed = {
        "jax_compilation_cache_dir": compile_cache,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in changed}
    for name, value in changed.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
