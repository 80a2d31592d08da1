"""How the family's arrays are cut over a mesh: a table of parameters, one of activations."""

from ._architecture import Architecture


# The last names of an array's path, and what cuts each of its axes. A matrix that widens is cut by
# `tensor` where it ends, one that narrows where it begins, so that the two need one sum between
# them; the other axis is cut by `fsdp`, and gathered where it is used. The leading axis of arrays
# under `layers` is the layer, which is never cut.
PARTITION: dict[str, tuple[str | None, ...]] = {
    "embedding": ("tensor", "fsdp"),
    "head": ("tensor", "fsdp"),
    "norm": (None,),
    "layers.input_norm": (None, None),
    "layers.post_norm": (None, None),
    "layers.query_norm": (None, None),
    "layers.key_norm": (None, None),
    "layers.query.weight": (None, "fsdp", "tensor"),
    "layers.key.weight": (None, "fsdp", "tensor"),
    "layers.value.weight": (None, "fsdp", "tensor"),
    "layers.gate.weight": (None, "fsdp", "tensor"),
    "layers.up.weight": (None, "fsdp", "tensor"),
    "layers.output.weight": (None, "tensor", "fsdp"),
    "layers.down.weight": (None, "tensor", "fsdp"),
    "layers.query.bias": (None, "tensor"),
    "layers.key.bias": (None, "tensor"),
    "layers.value.bias": (None, "tensor"),
    "layers.gate.bias": (None, "tensor"),
    "layers.up.bias": (None, "tensor"),
    "layers.output.bias": (None, None),
    "layers.down.bias": (None, None),
}

# What the rows of a batch are spread over, both at once.
ROWS = ("data", "fsdp")

# The same for what is computed.
ACTIVATIONS: dict[str, tuple[tuple[str, ...] | None, ...]] = {
    "residual": (ROWS, None, None),  # batch, time, d
    "cache": (ROWS, ("tensor",), None, None),  # batch, kv, time, head_dim
    # A lookup in a table that is cut along its width gives vectors cut that way, which no device
    # wants: gathering the table's width first is the smaller traffic.
    "looked_up": (("tensor",), None),  # vocab, d
}

# Arrays whose `tensor` axis may be cut between heads only, and how many heads that is.
_HEADS = {
    "layers.query": lambda facts: facts.num_heads,
    "layers.key": lambda facts: facts.num_kv_heads,
    "layers.value": lambda facts: facts.num_kv_heads,
}


def units(name: str, facts: Architecture) -> int | None:
    """How many pieces the `tensor` axis of an array consists of; any number if `None`."""
    for prefix, count in _HEADS.items():
        if name.startswith(f"{prefix}."):
            return count(facts)
    return None
