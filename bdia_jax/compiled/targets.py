"""GPUs to compile for without having one: XLA's compiler for them runs on any machine.

`devices("h100")` are devices as JAX knows them, on which nothing can run. What is lowered with one
as `jax.default_device`, or of arrays that are sharded over several, compiles to the program the GPU
would get: its memory plan, its kernels, its collectives. `bdia_jax.memory_report(device="h100")`
does so for one function.

It needs the extra `gpu-plan`, some GB of NVIDIA's libraries, and where there is no GPU
JAX_PLATFORMS=cpu, without which JAX leaves that compiler out. Choosing the fastest matrix products
(autotuning) needs the GPU itself, so a real one may take others.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Any

import jax

# Autotuning asks the GPU that is not there; cuBLAS is what it would choose for large products.
_OPTIONS: dict[str, Any] = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


@dataclass(frozen=True)
class Target:
    """A GPU, by the figures its maker publishes.

    Attributes:
        kind: its name.
        capability: CUDA's (major, minor).
        cores: streaming multiprocessors.
        clock_ghz: at most.
        memory: bytes a program can see.
        bandwidth: bytes a second, of that memory.
        l2, shared: bytes of the second-level cache, and of shared memory for each core.
        threads: for each core.
        flops: dtype as HLO writes it -> dense products a second that accumulate in float32, times
            two. That of "f32" is of TF32, where the GPU has it.
    """

    kind: str
    capability: tuple[int, int]
    cores: int
    clock_ghz: float
    memory: int
    bandwidth: float
    l2: int
    shared: int
    threads: int
    flops: Mapping[str, float]

    @property
    def usable(self) -> int:
        """Bytes a program may take; the rest is the runtime's, and slack of XLA's own.

        Beyond 0.766 of the memory (60.59 GiB of an H100's 79.1, as XLA says of a program that takes
        more) it computes values again to take less: what would not fit gets slower before it fails.
        """
        return int(0.766 * self.memory)

    @property
    def description(self) -> str:
        """XLA's GpuTargetConfigProto, as text."""
        major, minor = self.capability
        limits = {"x": 2**31 - 1, "y": 65535, "z": 65535}
        blocks = "\n".join(f"block_dim_limit_{axis}: {size}" for axis, size in limits.items())
        return f"""
            gpu_device_info {{
              cuda_compute_capability {{ major: {major} minor: {minor} }}
              core_count: {self.cores}
              clock_rate_ghz: {self.clock_ghz}
              fpus_per_core: {128 if self.capability >= (8, 6) else 64}
              device_memory_size: {self.memory}
              memory_bandwidth: {int(self.bandwidth)}
              l2_cache_size: {self.l2}
              shared_memory_per_core: {self.shared}
              shared_memory_per_block: 49152
              shared_memory_per_block_optin: {self.shared - 1024}
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              threads_per_core_limit: {self.threads}
              threads_per_block_limit: 1024
              threads_per_warp: 32
              {blocks}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
            device_description_str: "{self.kind}"
        """


def _flops(half: float, single: float) -> Mapping[str, float]:
    """Of 10^12 a second."""
    return MappingProxyType({"bf16": half * 1e12, "f16": half * 1e12, "f32": single * 1e12})


_GIB, _MIB, _KIB = 2**30, 2**20, 2**10
_A100 = Target(
    kind="NVIDIA A100-SXM4-80GB",
    capability=(8, 0),
    cores=108,
    clock_ghz=1.41,
    memory=int(79.2 * _GIB),
    bandwidth=2.039e12,
    l2=40 * _MIB,
    shared=164 * _KIB,
    threads=2048,
    flops=_flops(312, 156),
)
_H100 = replace(
    _A100,
    kind="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    cores=132,
    clock_ghz=1.98,
    memory=int(79.1 * _GIB),
    bandwidth=3.352e12,
    l2=50 * _MIB,
    shared=228 * _KIB,
    flops=_flops(989, 495),
)
_RTX4090 = Target(
    kind="NVIDIA GeForce RTX 4090",
    capability=(8, 9),
    cores=128,
    clock_ghz=2.52,
    memory=int(23.6 * _GIB),
    bandwidth=1.008e12,
    l2=72 * _MIB,
    shared=100 * _KIB,
    threads=1536,
    flops=_flops(165, 83),
)
_40GB = {"memory": int(39.5 * _GIB), "bandwidth": 1.555e12}
_H200 = {"memory": int(139.8 * _GIB), "bandwidth": 4.8e12}
_B200 = {"capability": (10, 0), "cores": 148, "clock_ghz": 1.965, "memory": int(178.3 * _GIB)}
_B200 |= {"bandwidth": 7.7e12, "l2": 126 * _MIB, "flops": _flops(2250, 1125)}
_2080TI = {"capability": (7, 5), "cores": 68, "clock_ghz": 1.545, "memory": int(10.7 * _GIB)}
_2080TI |= {"bandwidth": 6.16e11, "l2": int(5.5 * _MIB), "shared": 64 * _KIB, "threads": 1024}
_2080TI |= {"flops": _flops(54, 13.4)}
TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "a100-40gb": replace(_A100, kind="NVIDIA A100-SXM4-40GB", **_40GB),
        "a100": _A100,
        "h100": _H100,
        "h200": replace(_H100, kind="NVIDIA H200", **_H200),
        "b200": replace(_H100, kind="NVIDIA B200", **_B200),
        "rtx4090": _RTX4090,
        "rtx2080ti": replace(_RTX4090, kind="NVIDIA GeForce RTX 2080 Ti", **_2080TI),
    }
)


@cache
def devices(name: str, count: int = 1) -> tuple[Any, ...]:
    """So many GPUs of this kind, in one machine, to compile for.

    Raises:
        ValueError: a name that is none of `TARGETS`; without the extra.
    """
    if name not in TARGETS:
        raise ValueError(f"device is {name!r}, expected one of {', '.join(TARGETS)}")
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(
            topology_name="",
            platform="cuda",
            target_config=TARGETS[name].description,
            topology=f"1x1x{count}",
        )
    except Exception as error:  # of a plugin that is missing, each version raises another
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"cannot compile for {name} here ({reason}); pip install -e '.[gpu-plan]' has "
            "XLA's compiler for GPUs, for Linux; without a GPU, set JAX_PLATFORMS=cpu too"
        ) from error
    return tuple(topology.devices)


def default_device() -> Any:
    """What is compiled for, unless arrays are committed elsewhere."""
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None or isinstance(device, str):
        return jax.local_devices(backend=device)[0]
    return device


def run_options() -> dict[str, Any]:
    """XLA's options for a program that trains a reversible stack here; none on a CPU.

    In half precision XLA would move reshapes from a matrix product to behind an activation, and
    then compute that in two kernels, where one reads and writes half as much.
    """
    is_gpu = default_device().platform == "gpu"
    return {"xla_disable_hlo_passes": "reshape-mover"} if is_gpu else {}


def compile(lowered: jax.stages.Lowered, **options: Any) -> jax.stages.Compiled:
    """The program of what was lowered for such a device. options: of XLA, without their dashes."""
    return lowered.compile(compiler_options=_OPTIONS | options)
