"""Architectures of published checkpoints, so that a plan needs neither weights nor the hub."""

import difflib
import functools

from ._architecture import Architecture
from ._rope import RopeScaling


_qwen25 = functools.partial(Architecture, "qwen2", attention_bias=True, rope_theta=1e6)
_qwen25_large = functools.partial(_qwen25, tied=False)
_qwen25_large_base = functools.partial(_qwen25_large, max_positions=131072)
_qwen25_largest_base = functools.partial(_qwen25_large_base, norm_eps=1e-5)
_math = functools.partial(_qwen25, rope_theta=1e4, max_positions=4096)
_math_large = functools.partial(_math, tied=False)
_qwen3_base = functools.partial(Architecture, "qwen3", qk_norm=True, rope_theta=1e6)
_qwen3_large_base = functools.partial(_qwen3_base, tied=False)
_qwen3 = functools.partial(_qwen3_base, max_positions=40960)
_qwen3_large = functools.partial(_qwen3, tied=False)
_smollm2 = functools.partial(
    Architecture, "llama", rope_theta=1e5, norm_eps=1e-5, max_positions=8192
)
_smollm2_large = functools.partial(_smollm2, rope_theta=1.3e5)
_llama3 = functools.partial(
    Architecture,
    "llama",
    rope_theta=5e5,
    rope_scaling=RopeScaling("llama3", 8.0, original_positions=8192, low=1.0, high=4.0),
    norm_eps=1e-5,
    tied=False,
    max_positions=131072,
)

# From each repository's config.json. The numbers are vocabulary, width, layers, query heads,
# key-value heads, width of a head, and width of the feed-forward.
_KNOWN: dict[str, Architecture] = {
    "Qwen/Qwen2.5-0.5B": _qwen25(151936, 896, 24, 14, 2, 64, 4864),
    "Qwen/Qwen2.5-0.5B-Instruct": _qwen25(151936, 896, 24, 14, 2, 64, 4864),
    "Qwen/Qwen2.5-1.5B": _qwen25(151936, 1536, 28, 12, 2, 128, 8960, max_positions=131072),
    "Qwen/Qwen2.5-1.5B-Instruct": _qwen25(151936, 1536, 28, 12, 2, 128, 8960),
    "Qwen/Qwen2.5-3B": _qwen25(151936, 2048, 36, 16, 2, 128, 11008),
    "Qwen/Qwen2.5-3B-Instruct": _qwen25(151936, 2048, 36, 16, 2, 128, 11008),
    "Qwen/Qwen2.5-7B": _qwen25_large_base(152064, 3584, 28, 28, 4, 128, 18944),
    "Qwen/Qwen2.5-7B-Instruct": _qwen25_large(152064, 3584, 28, 28, 4, 128, 18944),
    "Qwen/Qwen2.5-14B": _qwen25_largest_base(152064, 5120, 48, 40, 8, 128, 13824),
    "Qwen/Qwen2.5-14B-Instruct": _qwen25_large(152064, 5120, 48, 40, 8, 128, 13824),
    "Qwen/Qwen2.5-32B": _qwen25_largest_base(152064, 5120, 64, 40, 8, 128, 27648),
    "Qwen/Qwen2.5-32B-Instruct": _qwen25_large(152064, 5120, 64, 40, 8, 128, 27648),
    "Qwen/Qwen2.5-72B": _qwen25_largest_base(152064, 8192, 80, 64, 8, 128, 29568),
    "Qwen/Qwen2.5-72B-Instruct": _qwen25_large(152064, 8192, 80, 64, 8, 128, 29568),
    "Qwen/Qwen2.5-Math-1.5B": _math(151936, 1536, 28, 12, 2, 128, 8960),
    "Qwen/Qwen2.5-Math-1.5B-Instruct": _math(151936, 1536, 28, 12, 2, 128, 8960),
    "Qwen/Qwen2.5-Math-7B": _math_large(152064, 3584, 28, 28, 4, 128, 18944),
    "Qwen/Qwen2.5-Math-7B-Instruct": _math_large(152064, 3584, 28, 28, 4, 128, 18944),
    "Qwen/Qwen3-0.6B": _qwen3(151936, 1024, 28, 16, 8, 128, 3072),
    "Qwen/Qwen3-0.6B-Base": _qwen3_base(151936, 1024, 28, 16, 8, 128, 3072),
    "Qwen/Qwen3-1.7B": _qwen3(151936, 2048, 28, 16, 8, 128, 6144),
    "Qwen/Qwen3-1.7B-Base": _qwen3_base(151936, 2048, 28, 16, 8, 128, 6144),
    "Qwen/Qwen3-4B": _qwen3(151936, 2560, 36, 32, 8, 128, 9728),
    "Qwen/Qwen3-4B-Base": _qwen3_base(151936, 2560, 36, 32, 8, 128, 9728),
    "Qwen/Qwen3-8B": _qwen3_large(151936, 4096, 36, 32, 8, 128, 12288),
    "Qwen/Qwen3-8B-Base": _qwen3_large_base(151936, 4096, 36, 32, 8, 128, 12288),
    "Qwen/Qwen3-14B": _qwen3_large(151936, 5120, 40, 40, 8, 128, 17408),
    "Qwen/Qwen3-14B-Base": _qwen3_large_base(151936, 5120, 40, 40, 8, 128, 17408),
    "Qwen/Qwen3-32B": _qwen3_large(151936, 5120, 64, 64, 8, 128, 25600),
    "HuggingFaceTB/SmolLM2-135M": _smollm2(49152, 576, 30, 9, 3, 64, 1536),
    "HuggingFaceTB/SmolLM2-135M-Instruct": _smollm2(49152, 576, 30, 9, 3, 64, 1536),
    "HuggingFaceTB/SmolLM2-360M": _smollm2(49152, 960, 32, 15, 5, 64, 2560),
    "HuggingFaceTB/SmolLM2-360M-Instruct": _smollm2(49152, 960, 32, 15, 5, 64, 2560),
    "HuggingFaceTB/SmolLM2-1.7B": _smollm2_large(49152, 2048, 24, 32, 32, 64, 8192),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _smollm2_large(49152, 2048, 24, 32, 32, 64, 8192),
    "meta-llama/Llama-3.3-70B-Instruct": _llama3(128256, 8192, 80, 64, 8, 128, 28672),
}


def known(repo: str) -> Architecture:
    """The architecture of a published checkpoint, from a table in this file: nothing is fetched.

    Args:
        repo: its id on the Hugging Face hub, for instance `"Qwen/Qwen2.5-3B-Instruct"`.

    Raises:
        ValueError: if it is not in the table, with the nearest names that are.
    """
    if repo in _KNOWN:
        return _KNOWN[repo]
    near = difflib.get_close_matches(repo, _KNOWN, n=3, cutoff=0.5)
    hint = f"the nearest names are {', '.join(near)}" if near else "they are like Qwen/Qwen3-8B"
    raise ValueError(
        f"{repo!r} is no local path and not in eqrl's table of architectures; {hint}, and a folder "
        "with the model's config.json will do"
    )
