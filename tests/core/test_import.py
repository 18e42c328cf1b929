"""What `import bdia_jax` needs and gives."""

import subprocess
import sys

import pytest

import bdia_jax

BLOCKER = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Blocker())
import bdia_jax, bdia_jax.lora, bdia_jax.models.vit, bdia_jax.sharding, bdia_jax.text.generate
"""
# of the extras; what jax and flax bring themselves is not among them
NOT_NEEDED = {
    *("absl", "array_record", "grain", "hypothesis", "jaxtyping", "matplotlib", "ml_collections"),
    *("pandas", "PIL", "pydantic", "pytest", "sacrebleu", "safetensors", "sklearn", "tensorflow"),
    *("tensorflow_datasets", "tiktoken", "tokenizers", "torch", "transformers"),
}


def run(blocked):
    command = [sys.executable, "-c", BLOCKER.format(blocked=blocked)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.claim("import needs jax and flax alone")
def test_the_library_imports_with_jax_and_flax_alone():
    result = run(NOT_NEEDED)
    assert result.returncode == 0, result.stderr


@pytest.mark.control("import needs jax and flax alone")
def test_without_flax_it_does_not():
    result = run({"flax"})
    assert result.returncode != 0 and "blocked: flax" in result.stderr


def test_the_public_names_are_those_of_the_contract():
    assert set(bdia_jax.__all__) == {
        *("Audit", "FixedPoint", "MemoryReport", "audit", "bdia_scan", "linen", "losses"),
        *("memory_report", "nnx", "residual_bytes", "sample_gamma"),
    }
    assert all(hasattr(bdia_jax, name) for name in bdia_jax.__all__)
    assert hasattr(bdia_jax.nnx, "BDIAStack") and hasattr(bdia_jax.linen, "BDIAStack")
