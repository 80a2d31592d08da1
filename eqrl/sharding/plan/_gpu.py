"""GPUs described by jax's CUDA plugin on a machine without one."""

import importlib.util
from typing import Any

from jax.experimental import topologies


# What XLA's compiler needs to know of a GPU, from NVIDIA's data sheets.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: 9 minor: 0 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 13 }}
device_description_str: "NVIDIA {name}"
"""
GPU_TARGETS = {
    "h100": _HOPPER.format(name="H100", bandwidth=3_350_000_000_000, memory=85_000_000_000),
    "h200": _HOPPER.format(name="H200", bandwidth=4_800_000_000_000, memory=150_000_000_000),
}
PER_HOST = 8
# Largest names that are offered; any multiple of a host would do.
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def gpu_counts(chip: str) -> dict[str, int]:
    """How many GPUs each name of one kind stands for, smallest first."""
    return {f"{chip}-{count}": count for count in _COUNTS}


def gpu_devices(chip: str, count: int) -> tuple[Any, ...]:
    """So many GPUs, eight a host, as XLA's compiler sees them.

    Raises:
        ValueError: if jax's CUDA plugin is not installed.
    """
    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    if not any(importlib.util.find_spec(plugin) for plugin in plugins):
        raise ValueError(
            f"a plan for {chip} needs jax's CUDA plugin, which needs no GPU: "
            'pip install "eqrl[cuda]"'
        )
    hosts = -(-count // PER_HOST)
    described = topologies.get_topology_desc(
        chip, "cuda", target_config=GPU_TARGETS[chip], topology=f"1x{hosts}x{count // hosts}"
    )
    return tuple(described.devices)
