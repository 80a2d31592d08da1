"""Published peaks of the chips that runs are planned for."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator chip, in numbers of its maker; nothing here is measured.

    A peak is never reached: times that are computed from it are lower bounds.

    Attributes:
        name: the word for it here, such as `v6e`.
        device_kind: what `jax.Device.device_kind` says on it.
        platform: `"tpu"`, `"gpu"` or `"cpu"`.
        hbm_bytes: memory that a program may use. Of a TPU, what its compiler (libtpu 0.0.42 and
            0.0.50) says is available when it refuses a larger program: less than the data sheet,
            for the run time keeps a part. Of a GPU, the data sheet's decimal number; the driver,
            the CUDA context and the allocator's default share of 75 % take from that.
        bf16_flops: dense bfloat16 matrix products, FLOPs a second and chip; a multiplication and an
            addition count as two. `None` where there is no such number.
        hbm_bytes_per_s: reads and writes together, a second and chip.
        link_bytes_per_s: what a chip sends to others of its host or slice, a second, in one
            direction, over all `ports` together. Makers often print the sum of both directions.
        ports: links of a TPU chip, each of which gives an equal share of `link_bytes_per_s`; a
            small slice leaves some of them unconnected, see `Topology.link_bytes_per_s`. 1 where a
            switch connects all chips of a host.
        hosts_link_bytes_per_s: what a chip sends to chips of other hosts, likewise. The hosts of a
            TPU slice are joined by the same links as its chips.
        source: where the numbers are published.
    """

    name: str
    device_kind: str
    platform: str
    hbm_bytes: int
    bf16_flops: float | None
    hbm_bytes_per_s: float | None
    link_bytes_per_s: float | None
    ports: int
    hosts_link_bytes_per_s: float | None
    source: str


_GIB = 2**30
_TPU = "https://docs.cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
# 8 ConnectX-7 adapters of 400 Gb/s for 8 GPUs.
_NETWORK = "https://docs.nvidia.com/dgx/dgxh100-user-guide/introduction-to-dgxh100.html"

CHIPS: dict[str, Chip] = {
    "v4": Chip(
        name="v4",
        device_kind="TPU v4",
        platform="tpu",
        hbm_bytes=int(30.75 * _GIB),  # of 32
        bf16_flops=275e12,
        hbm_bytes_per_s=1200e9,
        link_bytes_per_s=300e9,  # 6 links of 50 GB/s
        ports=6,
        hosts_link_bytes_per_s=300e9,
        source=f"{_TPU}v4 and arXiv:2304.01433",
    ),
    "v5e": Chip(
        name="v5e",
        device_kind="TPU v5 lite",
        platform="tpu",
        hbm_bytes=int(15.75 * _GIB),  # of 16
        bf16_flops=197e12,
        hbm_bytes_per_s=819e9,
        link_bytes_per_s=200e9,  # 400 GB/s in both directions
        ports=4,
        hosts_link_bytes_per_s=200e9,
        source=f"{_TPU}v5e",
    ),
    "v5p": Chip(
        name="v5p",
        device_kind="TPU v5",
        platform="tpu",
        hbm_bytes=95 * _GIB,
        bf16_flops=459e12,
        hbm_bytes_per_s=2765e9,
        link_bytes_per_s=600e9,  # 1,200 GB/s in both directions
        ports=6,
        hosts_link_bytes_per_s=600e9,
        source=f"{_TPU}v5p",
    ),
    "v6e": Chip(
        name="v6e",
        device_kind="TPU v6 lite",
        platform="tpu",
        hbm_bytes=int(31.24 * _GIB),  # of 32
        bf16_flops=918e12,
        hbm_bytes_per_s=1640e9,
        link_bytes_per_s=400e9,  # 800 GB/s in both directions
        ports=4,
        hosts_link_bytes_per_s=400e9,
        source=f"{_TPU}v6e",
    ),
    "h100": Chip(
        name="h100",
        device_kind="NVIDIA H100",
        platform="gpu",
        hbm_bytes=80_000_000_000,
        bf16_flops=989e12,  # the data sheet's 1,979 is with sparsity
        hbm_bytes_per_s=3350e9,
        link_bytes_per_s=450e9,  # NVLink, 900 GB/s in both directions
        ports=1,
        hosts_link_bytes_per_s=50e9,
        source=f"{_NVIDIA}h100/ (SXM) and {_NETWORK}",
    ),
    "h200": Chip(
        name="h200",
        device_kind="NVIDIA H200",
        platform="gpu",
        hbm_bytes=141_000_000_000,
        bf16_flops=989e12,
        hbm_bytes_per_s=4800e9,
        link_bytes_per_s=450e9,
        ports=1,
        hosts_link_bytes_per_s=50e9,
        source=f"{_NVIDIA}h200/ (SXM) and {_NETWORK}",
    ),
}
