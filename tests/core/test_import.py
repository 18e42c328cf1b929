import subprocess
import sys

import pytest

BLOCKER = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Blocker())
{statement}
"""
NOT_OURS = [
    "array_record", "chex", "datasets", "hypothesis", "jaxtyping", "matplotlib",
    "ml_collections", "pandas", "PIL", "pytest", "sklearn", "tensorflow",
    "tensorflow_datasets", "torch", "grain",
]  # fmt: skip


def run(statement, blocked):
    script = BLOCKER.format(blocked=set(blocked), statement=statement)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def test_the_library_imports_with_jax_and_flax_alone():
    result = run("import bdia_jax, bdia_jax.models.vit", NOT_OURS)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("needed", ["flax", "jax"])
def test_control_the_blocker_blocks(needed):
    result = run("import bdia_jax", [needed])
    assert result.returncode != 0 and f"blocked: {needed}" in result.stderr


def test_the_public_names_are_those_of_the_contract():
    import bdia_jax

    assert sorted(bdia_jax.__all__) == [
        "Audit", "FixedPoint", "MemoryReport", "audit", "bdia_scan", "linen", "losses",
        "memory_report", "nnx", "residual_bytes", "sample_gamma",
    ]  # fmt: skip
    assert all(hasattr(bdia_jax, name) for name in bdia_jax.__all__)
    assert hasattr(bdia_jax.nnx, "BDIAStack") and hasattr(bdia_jax.linen, "BDIAStack")
