"""Devices to compile for, present or not: their descriptions for XLA, and their published figures.

The figures are those of one chip, from Google Cloud's documentation of TPU v4, v5e, v5p and v6e, and from NVIDIA's
data sheets of A100, H100 and H200 (SXM, dense).
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from hiso_jax.checks import ParameterError

GB = 10**9
TFLOPS = 10**12
# JAX takes three quarters of a GPU's memory when it starts, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
GPU_FRACTION = 0.75
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
# libtpu needs these variables if there is no TPU, and the last one if a second process loads it.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Chip:
    """A chip and its published figures.

    Attributes:
      platform: ``tpu`` or ``cuda``.
      memory: bytes of memory.
      bandwidth: bytes a second from and to that memory.
      bfloat16: floating-point operations a second of matrix products in bfloat16.
      default, high, highest: those of float32 products in JAX's precisions: one, three and six passes of bfloat16 on
        TPU; TF32, TF32 and full float32 on GPUs.
      links: bytes a second to other devices.
      gpu: for a GPU: name, cores, L2 bytes, shared bytes of a core, compute capability, clock in GHz.
    """

    platform: str
    memory: int
    bandwidth: float
    bfloat16: float
    default: float
    high: float
    highest: float
    links: float
    gpu: tuple[str, int, int, int, tuple[int, int], float] | None = None


def _tpu(memory: float, bandwidth: float, rate: float, links: float) -> Chip:
    one = rate * TFLOPS
    return Chip("tpu", int(memory * GB), bandwidth * GB, one, one, one / 3, one / 6, links * GB)


CHIPS = {
    "v4": _tpu(32, 1228, 275, 300),
    "v5e": _tpu(16, 819, 197, 200),
    "v5p": _tpu(95, 2765, 459, 600),
    "v6e": _tpu(32, 1640, 918, 448),
    "a100": Chip(
        "cuda", 84_950_000_000, 2039 * GB, 312 * TFLOPS, 156 * TFLOPS, 156 * TFLOPS, 19.5 * TFLOPS, 300 * GB,
        ("NVIDIA A100-SXM4-80GB", 108, 40 << 20, 164 << 10, (8, 0), 1.41),
    ),
    "h100": Chip(
        "cuda", 84_940_000_000, 3350 * GB, 989 * TFLOPS, 494 * TFLOPS, 494 * TFLOPS, 67 * TFLOPS, 450 * GB,
        ("NVIDIA H100 80GB HBM3", 132, 50 << 20, 228 << 10, (9, 0), 1.98),
    ),
    "h200": Chip(
        "cuda", 150_750_000_000, 4800 * GB, 989 * TFLOPS, 494 * TFLOPS, 494 * TFLOPS, 67 * TFLOPS, 450 * GB,
        ("NVIDIA H200", 132, 50 << 20, 228 << 10, (9, 0), 1.98),
    ),
}  # fmt: skip
EXAMPLES = "v5e:2x4 (chips) or h100:1x1x8 (partitions x hosts x GPUs of a host)"


@dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
      name: the requested name.
      chip: the chip of every device.
      devices: all devices.
    """

    name: str
    chip: Chip
    devices: Sequence[jax.Device]

    @property
    def usable(self) -> int:
        """Bytes of a device's memory that a program may take."""
        return int(self.chip.memory * (float(os.environ.get(FRACTION, GPU_FRACTION)) if self.chip.gpu else 1))


def chip_of(name: str) -> Chip:
    """The chip of a target, from its name alone.

    Raises:
      ValueError: the name is not that of a target.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){1,2}", shape):
        raise ParameterError("target", f"must be one of {', '.join(CHIPS)} and a shape, like {EXAMPLES}; got {name}")
    return CHIPS[kind]


def target(name: str) -> Target:
    """Devices by name: ``v5e:2x4``, ``h100:1x1x8``.

    Raises:
      ValueError: the name is not that of a target, its compiler is not installed, or the shape does not exist.
    """
    chip = chip_of(name)
    shape = name.partition(":")[2]
    extra = "tpu" if chip.platform == "tpu" else "cuda"
    try:
        if chip.platform == "tpu":
            for variable, value in TPU_ENVIRONMENT.items():
                os.environ.setdefault(variable, value)
            options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if shape in ("1x1", "1x1x1") else {}
            found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
        else:
            found = topologies.get_topology_desc(platform="cuda", target_config=_described(chip), topology=shape)
    except Exception as error:
        # Plug-ins raise any kind of exception for a missing package or an impossible shape.
        reason = " ".join(str(error).split())[:200]
        raise ParameterError(
            "target",
            f"{name} cannot be compiled for: it needs the compiler of pip install '.[{extra}]', and a "
            f"shape that exists; {reason or type(error).__name__}",
        ) from error
    return Target(name, chip, found.devices)


def _described(chip: Chip) -> str:
    """The description of a GPU as text of XLA's ``GpuTargetConfigProto``."""
    assert chip.gpu is not None
    name, cores, cache, shared, (major, minor), clock = chip.gpu
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 << 10,
        "shared_memory_per_core": shared,
        "shared_memory_per_block_optin": shared - 1024,
        "threads_per_core_limit": 2048,
        "core_count": cores,
        "fpus_per_core": 128 if major >= 9 else 64,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
        "memory_bandwidth": int(chip.bandwidth),
        "l2_cache_size": cache,
        "clock_rate_ghz": clock,
        "device_memory_size": chip.memory,
        "device_address_bits": 64,
    }
    lines = [f"{field}: {value}" for field, value in device.items()]
    versions = [f'{kind}_version: "13.0.0"' for kind in ("driver", "runtime", "compile_time_toolkit")]
    words = [f'name: "{name}"', 'device_vendor: "NVIDIA Corporation"', 'dnn_version: "9.12.0"', *versions]
    capability = f"cuda_compute_capability {{ major: {major} minor: {minor} }}"
    inner = "\n".join([*lines, *words, capability])
    return f"""gpu_device_info {{ {inner} }}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 }}
device_description_str: "{name}"
"""
