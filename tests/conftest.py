"""Several CPU devices, so that sharded equals unsharded can be tested; `gpu` tests need a GPU."""

import contextlib
import os
import shutil
import sys

_FLAG = "--xla_force_host_platform_device_count"
if "jax" not in sys.modules and _FLAG not in os.environ.get("XLA_FLAGS", ""):
    # only the CPU platform reads this; on a GPU it changes nothing
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8".strip()

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402
from jax._src import compiler  # noqa: E402

pytest_plugins = ["pytester", "tiers"]

_COMPILED_AT_MOST = 2 * 2**30  # bytes; what grew beyond is thrown away

settings.register_profile("bdia", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("bdia")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests go to one worker: its fixtures are made, and its functions compiled, once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


def pytest_configure(config):
    """A program compiled once is loaded where it is needed again, by another worker or run, too."""
    folder = config.rootpath / ".pytest_cache" / "d" / "compiled"  # --cache-clear empties it
    if not hasattr(config, "workerinput") and folder.exists():
        size = sum(file.stat().st_size for file in folder.iterdir())
        if size > _COMPILED_AT_MOST:
            shutil.rmtree(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


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


@contextlib.contextmanager
def _optimizations(on: bool):
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", not on)
    with pytest.MonkeyPatch.context() as patch:
        if _HAS_OLDER_LOOPS:
            patch.setattr(compiler, "get_compile_options", _OPTIONS if on else _quick_options)
        yield
    jax.config.update("jax_disable_most_optimizations", before)


# XLA's older way to write the loops of a CPU's program takes half of the time to compile
_HAS_OLDER_LOOPS = jax.__version_info__ < (0, 11)
_OPTIONS = compiler.get_compile_options


def _quick_options(*args, env_options_overrides, **options):
    overrides = {"xla_cpu_use_fusion_emitters": False} | env_options_overrides
    return _OPTIONS(*args, env_options_overrides=overrides, **options)


@pytest.fixture
def quick_processes(monkeypatch):
    """Processes that a test starts compile as `quick_compile` does, and find what is compiled."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if _HAS_OLDER_LOOPS:
        flags = f"{os.environ['XLA_FLAGS']} --xla_cpu_use_fusion_emitters=false"
        monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.values["jax_compilation_cache_dir"])
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


@pytest.fixture
def unoptimized():
    """Programs that compile in half the time, for a test that is not about them."""
    with _optimizations(False):
        yield


@pytest.fixture(autouse=True)
def doctests_compile_quickly(request):
    if isinstance(request.node, pytest.DoctestItem):
        request.getfixturevalue("unoptimized")


@pytest.fixture(scope="module")  # and no longer: exactness is tested in optimized programs
def quick_compile():
    """`unoptimized` for all tests of a module, and for its fixtures of this scope."""
    with _optimizations(False):
        yield


@pytest.fixture
def optimized(request):
    """In such a module, for a test of exactness. Only what it jits itself is compiled anew."""
    if "quick_compile" in request.fixturenames:
        request.getfixturevalue("quick_compile")
    with _optimizations(True):
        yield
