"""Architecture, stop ids and tensors of a GGUF file (llama.cpp's format)."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from ._architecture import Architecture
from ._rope import RopeScaling


_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_OF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_BACK = {ours: theirs for theirs, ours in (_WHOLE | _OF_LAYER).items()}


def open_gguf(path: Path) -> Any:
    """A `gguf.GGUFReader`, which maps the file and reads nothing yet."""
    try:
        import gguf
    except ImportError:
        raise ValueError("reading .gguf files needs `pip install gguf`") from None
    return gguf.GGUFReader(path)


class GGUFSource:
    """Tensors by their Hugging Face names, dequantized to float32.

    llama.cpp interleaves the two halves of every query and key head of the llama family (its
    rotary embedding turns neighbours); that is undone here.
    """

    def __init__(self, path: Path):
        self._reader = open_gguf(path)
        self._tensors = {_hf_name(tensor.name): tensor for tensor in self._reader.tensors}
        self.metadata = Metadata(self._reader)
        self.architecture = read_architecture(self.metadata, self.shapes())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor in `[out in]` order."""
        return {
            name: tuple(int(size) for size in tensor.shape[::-1])
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Part of the dequantized tensor, `[out in]`; only blocks that it touches are read."""
        import gguf

        tensor = self._tensors[name]
        rows, *columns = index
        if self.architecture.family == "llama" and re.search(r"\.[qk]_proj\.", name):
            rows = _stored_rows(int(tensor.shape[-1]), self.architecture.head_dim)[rows]
        if not columns:  # quantized in blocks along this very axis
            return gguf.dequantize(tensor.data, tensor.tensor_type)[rows]
        block = gguf.GGML_QUANT_SIZES[tensor.tensor_type][0]
        stored = tensor.data.shape[-1] * block // int(tensor.shape[0])  # elements of a block
        first, last = columns[0].start // block, -(-columns[0].stop // block)
        data = np.ascontiguousarray(tensor.data[rows, first * stored : last * stored])
        skipped = slice(columns[0].start - first * block, columns[0].stop - first * block)
        return gguf.dequantize(data, tensor.tensor_type)[:, skipped]


def _stored_rows(count, head_dim):
    """Where in the file each row of a query or key projection is."""
    return np.arange(count).reshape(-1, head_dim // 2, 2).swapaxes(1, 2).ravel()


def _hf_name(name):
    """The Hugging Face name; unknown names stay as they are and are refused later."""
    if name in _BACK:
        return _BACK[name]
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if found is None or found[2] not in _BACK:
        return name
    return f"model.layers.{found[1]}.{_BACK[found[2]]}.{found[3]}"


class Metadata:
    """The key-value pairs of a GGUF file."""

    def __init__(self, reader):
        self._fields = reader.fields

    def get(self, name: str, default: Any = None) -> Any:
        """The value of `name`, or `default`."""
        field = self._fields.get(name)
        return default if field is None else field.contents()

    def need(self, name: str) -> Any:
        """The value of `name`, or a `ValueError` that names it."""
        value = self.get(name)
        if value is None:
            raise ValueError(f"the GGUF file lacks the key {name!r}")
        return value

    def stop_ids(self) -> tuple[int, ...]:
        """Ids of end of sequence, of turn and of message, without repetition."""
        names = (f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom"))
        ids = (self.get(name) for name in names)
        return tuple(dict.fromkeys(int(token) for token in ids if token is not None))


def read_architecture(metadata: Metadata, shapes: dict[str, tuple[int, ...]]) -> Architecture:
    """The architecture out of metadata and of which tensors there are."""
    family = metadata.need("general.architecture")
    if family not in ("llama", "qwen2", "qwen3"):
        raise ValueError(
            f"GGUF architecture {family!r} is not supported; eqrl runs llama, qwen2 and qwen3"
        )

    def need(name):
        return metadata.need(f"{family}.{name}")

    if metadata.get(f"{family}.expert_count"):
        raise ValueError(f"{family}.expert_count (mixture of experts) is not supported")
    heads, width = int(need("attention.head_count")), int(need("embedding_length"))
    first = "model.layers.0."
    return Architecture(
        family=family,
        vocab_size=shapes["model.embed_tokens.weight"][0],
        width=width,
        num_layers=int(need("block_count")),
        num_heads=heads,
        num_kv_heads=int(metadata.get(f"{family}.attention.head_count_kv", heads)),
        head_dim=int(metadata.get(f"{family}.attention.key_length", width // heads)),
        ff_width=int(need("feed_forward_length")),
        rope_theta=float(metadata.get(f"{family}.rope.freq_base", 10000.0)),
        rope_scaling=_scaling(metadata, family),
        norm_eps=_short(need("attention.layer_norm_rms_epsilon")),
        tied="lm_head.weight" not in shapes,
        attention_bias=first + "self_attn.q_proj.bias" in shapes,
        output_bias=first + "self_attn.o_proj.bias" in shapes,
        mlp_bias=first + "mlp.gate_proj.bias" in shapes,
        qk_norm=first + "self_attn.q_norm.weight" in shapes,
        max_positions=int(need("context_length")),
    )


def _short(value):
    """The short decimal a float32 came from: 9.999999747378752e-06 was written as 1e-05."""
    return float(str(np.float32(value)))


def _scaling(metadata, family):
    kind = metadata.get(f"{family}.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind != "linear":
        raise ValueError(
            f"rope scaling {kind!r} in a GGUF file is not supported; "
            "load the safetensors checkpoint"
        )
    return RopeScaling("linear", float(metadata.need(f"{family}.rope.scaling.factor")))
