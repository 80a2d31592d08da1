"""The static facts of a decoder, read from and written to a `config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from ._rope import RopeScaling


Family: TypeAlias = Literal["qwen2", "qwen3", "llama"]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What one needs to know of a checkpoint besides its weights.

    Attributes:
        family: `qwen2` (also Qwen2.5), `qwen3` or `llama` (also SmolLM2).
        vocab_size: rows of the embedding.
        width: of the residual stream.
        num_layers: decoder layers.
        num_heads: query heads of a layer.
        num_kv_heads: key and value heads of a layer; divides `num_heads`.
        head_dim: width of a head; need not be `width / num_heads`.
        ff_width: inner width of the feed-forward.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how they are stretched, or `None`.
        norm_eps: of all norms.
        tied: the unembedding is the embedding.
        attention_bias: queries, keys and values have biases.
        output_bias: the attention's output projection has one.
        mlp_bias: the three feed-forward projections have one.
        qk_norm: queries and keys are normed per head.
        max_positions: the longest sequence the checkpoint was made for.
    """

    family: Family
    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ff_width: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tied: bool = True
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    max_positions: int = 32768

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is no multiple of num_kv_heads={self.num_kv_heads}; "
                "change one of them"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embeddings need it even")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Architecture":
        """Reads a Hugging Face `config.json`, of transformers 4 or 5.

        Args:
            config: the parsed file.

        Returns:
            The architecture.

        Raises:
            ValueError: naming the first thing in `config` that eqrl cannot run.
        """
        from ._config import read_config  # here because `_config` builds this class

        return read_config(config)

    def to_config(self) -> dict[str, Any]:
        """The `config.json` that transformers, vLLM and `from_config` read back."""
        from ._config import write_config

        return write_config(self)
