"""A byte-level BPE tokenizer rebuilt from the metadata of a GGUF file."""

from typing import Any

from ._gguf import Metadata


# How Qwen2 splits text before merging (published in its tokenizer.json).
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Values of `tokenizer.ggml.token_type`.
_CONTROL, _USER_DEFINED = 3, 4


def gguf_tokenizer(metadata: Metadata) -> Any:
    """The tokenizer that a GGUF file describes.

    Args:
        metadata: of the file.

    Returns:
        A `transformers.PreTrainedTokenizerFast` with special tokens and chat template.

    Raises:
        ValueError: the file's tokenizer is not byte-level BPE of a known pre-tokenization.
    """
    from transformers import PreTrainedTokenizerFast

    kind = metadata.need("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(f"GGUF tokenizer {kind!r} is not supported; eqrl rebuilds 'gpt2' (BPE)")
    tokens = metadata.need("tokenizer.ggml.tokens")
    special = {
        f"{name}_token": tokens[token]
        for name, stored in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (token := metadata.get(f"tokenizer.ggml.{stored}_token_id")) is not None
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_bpe(metadata, tokens),
        clean_up_tokenization_spaces=False,
        model_max_length=_context(metadata),
        **special,
    )
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer


def _context(metadata):
    family = metadata.need("general.architecture")
    return int(metadata.need(f"{family}.context_length"))


def _bpe(metadata, tokens):
    import tokenizers

    merges = [tuple(pair.split(" ")) for pair in metadata.need("tokenizer.ggml.merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    built = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    built.normalizer, built.pre_tokenizer = _splitting(metadata.get("tokenizer.ggml.pre"))
    built.decoder = tokenizers.decoders.ByteLevel()
    types = metadata.get("tokenizer.ggml.token_type", [])
    for token, kind in zip(tokens, types, strict=False):
        added = tokenizers.AddedToken(token, special=kind == _CONTROL, normalized=False)
        if kind == _CONTROL:
            built.add_special_tokens([added])
        elif kind == _USER_DEFINED:
            built.add_tokens([added])
    return built


def _splitting(name):
    """`(normalizer, pre-tokenizer)` of one of llama.cpp's named pre-tokenizations."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    match name:
        case "smollm":
            digits = pre_tokenizers.Digits(individual_digits=True)
            words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
            return None, pre_tokenizers.Sequence([digits, words])
        case "qwen2":
            split = pre_tokenizers.Split(Regex(_QWEN2), behavior="isolated")
            to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            return normalizers.NFC(), pre_tokenizers.Sequence([split, to_bytes])
        case "gpt-2":
            return None, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    raise ValueError(
        f"GGUF pre-tokenization {name!r} is not supported; eqrl rebuilds smollm, qwen2 and gpt-2"
    )
