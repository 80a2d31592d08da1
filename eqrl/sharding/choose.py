"""Which mesh: the one that sends least, of those whose memory suffices."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree

from ..models import Architecture, Transformer
from .mesh import make_mesh
from .place import abstract, device_bytes


# Of a device's memory, what the training state may take; activations, caches and the runtime want
# the rest.
_SHARE = 0.6


@dataclasses.dataclass(frozen=True)
class MeshChoice:
    """A mesh, and what speaks for it.

    Attributes:
        axes: as `make_mesh` reads it.
        mesh: the devices.
        state_bytes: of the training state and its gradient, on one device.
        sent_bytes: by one device in one training step, to others.
        fits: whether the state leaves room for the rest.
        capacity: bytes of memory of one device; `None` if not known.
    """

    axes: str
    mesh: Mesh
    state_bytes: int
    sent_bytes: int
    fits: bool
    capacity: int | None

    def __str__(self) -> str:
        size = f"{self.state_bytes / 2**30:.2f} GiB of state"
        room = "" if self.capacity is None else f" of {self.capacity / 2**30:.1f}"
        sends = f"{self.sent_bytes / 2**30:.2f} GiB sent a step"
        return f"{self.axes}: {size}{room} and {sends} by each device"


def mesh_choices(
    policy: Transformer,
    state: PyTree,
    *,
    devices: Sequence[Any] | None = None,
    capacity: int | None = None,
    row_units: Sequence[int] = (),
    update_tokens: int,
    micro_batches: int,
) -> list[MeshChoice]:
    r"""All meshes of the devices that can be used, the best one first.

    Those that fit come before those that do not; among them the smallest `tensor`, whose exchanges
    stand between any two products, two a layer for every token sampled; then fewer bytes sent. By
    one device in a step, with $P$ parameters of $b$ bytes, $L$ layers of width $d$, $n$ tokens in
    its updates and $m$ micro-batches, on axes of $D$, $F$ and $T$ devices:

    - `fsdp`: the weights gathered forward, backward and to recompute, and gradients summed in
      float32, for each micro-batch: $m (3b + 4) P/T \cdot (F-1)/F$; and $bP/T$ once more for the
      rollout;
    - `data`: gradients summed: $2 m \cdot 4P/(FT) \cdot (D-1)/D$;
    - `tensor`: the residual stream summed twice a layer, forward and backward:
      $4 L \cdot 2 n d b/(DF) \cdot (T-1)/T$.

    Args:
        policy: the model, or one of `jax.ShapeDtypeStruct`.
        state: the training state, or one of shapes: everything that stays while training.
        devices: to use; all by default.
        capacity: bytes of memory of one device; any amount by default.
        row_units: numbers of rows that should divide over the mesh: prompts of a pass, rows of a
            micro-batch. Meshes that cut rows finer than the largest are left out.
        update_tokens: tokens of all rows, prompts too, that a step's updates go through.
        micro_batches: of a step: accumulation steps times updates.

    Returns:
        Never empty.
    """
    devices = jax.devices() if devices is None else list(devices)
    width = jnp.dtype(policy.embedding.dtype).itemsize
    # Summed in float32, and cut like the weights.
    gradient = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), policy)

    def choice(axes: str, sizes: tuple[int, int, int]) -> MeshChoice:
        mesh = make_mesh(axes, devices)
        held = device_bytes(abstract((state, gradient), mesh, policy.architecture))
        sent = _sent(policy, sizes, width, update_tokens, micro_batches)
        fits = capacity is None or held <= _SHARE * capacity
        return MeshChoice(axes, mesh, held, sent, fits, capacity)

    candidates = _candidates(len(devices), policy.architecture, _per_host(devices))
    found = [
        choice(axes, sizes)
        for axes, sizes in candidates
        if not row_units or sizes[0] * sizes[1] <= max(row_units)
    ]
    if not found:  # more devices than rows: somebody must compute on padding
        found = [choice(f"fsdp={len(devices)}", (1, len(devices), 1))]

    def badness(choice: MeshChoice):
        if not choice.fits:
            return True, choice.state_bytes, 0, 0
        # Of two that send the same, the one that holds less.
        return False, choice.mesh.shape["tensor"], choice.sent_bytes, choice.state_bytes

    return sorted(found, key=badness)


def _candidates(
    count: int, facts: Architecture, per_host: int
) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """Axes whose sizes multiply to `count`; `tensor` within a host, and between heads."""
    for tensor in (t for t in range(1, count + 1) if count % t == 0):
        if per_host % tensor or facts.num_kv_heads % tensor or facts.ff_width % tensor:
            continue
        rest = count // tensor
        for fsdp in (f for f in range(1, rest + 1) if rest % f == 0):
            sizes = (rest // fsdp, fsdp, tensor)
            named = zip(("data", "fsdp", "tensor"), sizes, strict=True)
            yield ",".join(f"{n}={s}" for n, s in named if s > 1) or "data=1", sizes


def _per_host(devices) -> int:
    hosts = {device.process_index for device in devices}
    return max(len(devices) // len(hosts), 1)


def _sent(policy, sizes, width: int, tokens: int, micro_batches: int) -> int:
    data, fsdp, tensor = sizes
    facts = policy.architecture
    size = sum(math.prod(x.shape) for x in jax.tree.leaves(policy))
    per_weight = micro_batches * (3 * width + 4) + width
    gathered = per_weight * size / tensor * (fsdp - 1) / fsdp
    summed = 2 * micro_batches * 4 * size / (fsdp * tensor) * (data - 1) / data
    residual = tokens * facts.width * width / (data * fsdp)
    crossed = 4 * facts.num_layers * 2 * residual * (tensor - 1) / tensor
    return int(gathered + summed + crossed)
