"""What `import bdia_jax` needs and gives."""

import subprocess
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import bdia_jax

IMPORT_ALL = """
import importlib, importlib.abc, pkgutil, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Blocker())
import bdia_jax
for module in pkgutil.walk_packages(bdia_jax.__path__, "bdia_jax."):
    if not module.name.startswith("bdia_jax.interop"):  # of an extra of that name
        importlib.import_module(module.name)
"""


def brought_by(*distributions: str) -> set[str]:
    """The top-level modules that installing these installs, with what they require."""
    found, left = set(), [canonicalize_name(name) for name in distributions]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            required = map(Requirement, metadata.requires(name) or [])
            left += [
                canonicalize_name(each.name)
                for each in required
                if not each.marker or each.marker.evaluate({"extra": ""})
            ]
    return {
        module
        for module, names in metadata.packages_distributions().items()
        if any(canonicalize_name(name) in found for name in names)
    }


def import_all(blocked):
    command = [sys.executable, "-c", IMPORT_ALL.format(blocked=blocked)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.claim("import needs jax and flax alone")
def test_the_library_imports_with_jax_and_flax_alone():
    blocked = set(metadata.packages_distributions()) - brought_by("jax", "flax") - {"bdia_jax"}
    assert {"PIL", "ml_collections", "safetensors", "tensorflow_datasets"} <= blocked
    result = import_all(blocked)
    assert result.returncode == 0, result.stderr


@pytest.mark.control("import needs jax and flax alone")
def test_without_flax_it_does_not():
    result = import_all({"flax"})
    assert result.returncode != 0 and "blocked: flax" in result.stderr


def test_the_public_names_are_those_of_the_contract():
    assert sorted(bdia_jax.__all__) == [
        "Audit",
        "FixedPoint",
        "MemoryReport",
        "Recomputed",
        "RematAudit",
        "audit",
        "audit_remat",
        "bdia_scan",
        "linen",
        "losses",
        "memory_report",
        "nnx",
        "pin_rounding",
        "residual_bytes",
        "sample_gamma",
    ]
    assert all(hasattr(bdia_jax, name) for name in bdia_jax.__all__)
    assert hasattr(bdia_jax.nnx, "BDIAStack") and hasattr(bdia_jax.linen, "BDIAStack")
