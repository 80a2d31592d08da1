"""A Hugging Face checkpoint as the float32 GGUF file that llama.cpp loads; also as a command.

    python tests/write_gguf.py FOLDER FILE --stop 2 --restart 127.0.0.1:PORT

The vocabulary is made up (token `i` reads `<i>`): for clients that send and read ids only. With a
real one, llama.cpp leaves out the log-probs of tokens that end amid a character. Nothing of eqrl
is imported, so a mistake in what eqrl writes does not cancel out here.
"""

import argparse
import json
import os
import pathlib
import socket
from collections.abc import Sequence

import gguf
import numpy as np
from safetensors.numpy import load_file


_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_OF_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(folder: str | os.PathLike, file: str | os.PathLike, stop_ids: Sequence[int]) -> None:
    """Writes it aside and renames it, so that a reader never sees half a file.

    Args:
        folder: a checkpoint of the llama or qwen2 family, in one shard.
        file: where to; one that is there is replaced.
        stop_ids: end-of-sequence id, then end-of-turn id, then end-of-message id.
    """
    folder, file = pathlib.Path(folder), pathlib.Path(file)
    config = json.loads((folder / "config.json").read_text())
    work = file.with_name(f".{file.name}.writing")
    writer = gguf.GGUFWriter(work, config["model_type"])
    _add_architecture(writer, config)
    _add_vocabulary(writer, config["vocab_size"], stop_ids)
    for name, array in load_file(folder / "model.safetensors").items():
        array = array.astype(np.float32)
        if config["model_type"] == "llama" and ("q_proj" in name or "k_proj" in name):
            array = _interleave(array, _head_dim(config))
        writer.add_tensor(_gguf_name(name), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(work, file)


def _head_dim(config) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _add_architecture(writer, config) -> None:
    rope = config.get("rope_parameters") or config
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)


def _add_vocabulary(writer, size: int, stop_ids: Sequence[int]) -> None:
    """A byte-level BPE vocabulary of numbers; llama.cpp wants at least one merge."""
    kinds = [gguf.TokenType.NORMAL] * size
    for kind, token in zip(("eos", "eot", "eom"), stop_ids, strict=False):
        kinds[token] = gguf.TokenType.CONTROL
        writer.add_uint32(f"tokenizer.ggml.{kind}_token_id", token)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["<", ">", "<>"] + [f"<{i}>" for i in range(3, size)])
    writer.add_token_types(kinds)
    writer.add_token_merges(["< >"])
    writer.add_add_bos_token(False)


def _interleave(array: np.ndarray, head_dim: int) -> np.ndarray:
    """llama.cpp turns neighbours where Hugging Face turns the halves of a head."""
    halves = array.reshape(-1, 2, head_dim // 2, *array.shape[1:])
    return np.swapaxes(halves, 1, 2).reshape(array.shape)


def _gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` is `blk.3.ffn_up.weight`."""
    if name in _WHOLE:
        return _WHOLE[name]
    _, _, number, *module, kind = name.split(".")
    return f"blk.{number}.{_OF_LAYER['.'.join(module)]}.{kind}"


def _restart(address: str) -> None:
    """Has the `LlamaServer` that listens there serve the file anew."""
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), timeout=30) as channel:
        if channel.recv(16) != b"restarted":
            raise SystemExit("the server did not restart")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("file")
    parser.add_argument("--stop", type=int, action="append", default=[])
    parser.add_argument("--restart")
    args = parser.parse_args()
    write_gguf(args.folder, args.file, args.stop)
    if args.restart:
        _restart(args.restart)
