"""Between Hugging Face's `config.json` and `Architecture`; what cannot run is refused by name."""

import math
from collections.abc import Mapping
from typing import Any

from ._architecture import Architecture
from ._rope import RopeScaling


_CLASSES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}
_SUPPORTED = ", ".join(_CLASSES)


def read_config(config: Mapping[str, Any]) -> Architecture:
    """See `Architecture.from_config`."""
    refuse_unsupported(config)
    family = config["model_type"]
    heads = _need(config, "num_attention_heads")
    width = _need(config, "hidden_size")
    head_dim = config.get("head_dim") or (128 if family == "qwen3" else width // heads)
    # Qwen2 always has biases on queries, keys and values and never elsewhere; in the two other
    # families `attention_bias` switches all four projections of attention.
    bias = bool(config.get("attention_bias", False))
    theta, scaling = _read_rope(config)
    return Architecture(
        family=family,
        vocab_size=_need(config, "vocab_size"),
        width=width,
        num_layers=_need(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        ff_width=_need(config, "intermediate_size"),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tied=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bias or family == "qwen2",
        output_bias=bias and family != "qwen2",
        mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        max_positions=config.get("max_position_embeddings") or 2048,
    )


def refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Raises a `ValueError` that names the first thing in `config` that eqrl cannot run."""
    family = config.get("model_type")
    if family not in _CLASSES:
        raise ValueError(f"model_type {family!r} is not supported; eqrl runs {_SUPPORTED}")
    classes = config.get("architectures") or [_CLASSES[family]]
    if list(classes) != [_CLASSES[family]]:
        raise ValueError(
            f"architectures {classes!r} is not supported; eqrl runs [{_CLASSES[family]!r}]"
        )
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"hidden_act {activation!r} is not supported; eqrl runs 'silu'")
    for name in ("num_experts", "num_local_experts"):
        if config.get(name):
            raise ValueError(f"{name}={config[name]} (mixture of experts) is not supported")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ValueError(
            f"quantization_config with quant_method {method!r} is not supported; "
            "load the unquantized checkpoint"
        )
    if _slides(config):
        raise ValueError(
            "sliding-window attention is not supported; set use_sliding_window to false if all "
            "your sequences fit into the window"
        )


def _slides(config):
    types = config.get("layer_types")
    if types is not None:
        return any(kind != "full_attention" for kind in types)
    in_use = config.get("use_sliding_window") and config.get("sliding_window")
    # The first `max_window_layers` layers attend to everything.
    full = config.get("max_window_layers", 0)
    return bool(in_use) and full < config.get("num_hidden_layers", 0)


def _need(config, name):
    if config.get(name) is None:
        raise ValueError(f"config.json lacks {name!r}")
    return config[name]


def _read_rope(config):
    """`(theta, scaling)`; transformers 5 writes one `rope_parameters` dict for both."""
    facts = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = facts.get("rope_theta", config.get("rope_theta"))
    theta = 10000.0 if theta is None else float(theta)
    part = facts.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if part not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor={part} is not supported; eqrl rotates whole heads")
    kind = facts.get("rope_type", facts.get("type", "default"))
    match kind:
        case "default":
            return theta, None
        case "linear":
            return theta, RopeScaling("linear", float(_need(facts, "factor")))
        case "llama3":
            return theta, _read_llama3(facts)
        case "yarn":
            return theta, _read_yarn(facts, config)
    raise ValueError(
        f"rope type {kind!r} is not supported; eqrl runs default, linear, llama3 and yarn"
    )


def _read_llama3(facts):
    return RopeScaling(
        "llama3",
        factor=float(_need(facts, "factor")),
        original_positions=int(_need(facts, "original_max_position_embeddings")),
        low=float(_need(facts, "low_freq_factor")),
        high=float(_need(facts, "high_freq_factor")),
    )


def _read_yarn(facts, config):
    for name in ("mscale", "mscale_all_dim"):
        if facts.get(name):
            raise ValueError(f"{name} in yarn rope scaling is not supported")
    if not facts.get("truncate", True):
        raise ValueError("truncate=false in yarn rope scaling is not supported")
    factor = float(_need(facts, "factor"))
    original = facts.get("original_max_position_embeddings")
    magnitude = facts.get("attention_factor")
    # Peng et al. 2023 (arXiv:2309.00071), equation 22: softmax temperature as a scale on q and k.
    default = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return RopeScaling(
        "yarn",
        factor=factor,
        original_positions=int(original or _need(config, "max_position_embeddings")),
        low=float(facts.get("beta_slow") or 1.0),
        high=float(facts.get("beta_fast") or 32.0),
        magnitude=default if magnitude is None else float(magnitude),
    )


def write_config(facts: Architecture) -> dict[str, Any]:
    """See `Architecture.to_config`. The form of transformers 4, which 5 and vLLM read too."""
    _refuse_unwritable(facts)
    config = {
        "architectures": [_CLASSES[facts.family]],
        "model_type": facts.family,
        "vocab_size": facts.vocab_size,
        "hidden_size": facts.width,
        "num_hidden_layers": facts.num_layers,
        "num_attention_heads": facts.num_heads,
        "num_key_value_heads": facts.num_kv_heads,
        "head_dim": facts.head_dim,
        "intermediate_size": facts.ff_width,
        "hidden_act": "silu",
        "rope_theta": facts.rope_theta,
        "rope_scaling": _write_scaling(facts.rope_scaling),
        "rms_norm_eps": facts.norm_eps,
        "tie_word_embeddings": facts.tied,
        "max_position_embeddings": facts.max_positions,
    }
    if facts.family == "qwen2":
        return config | {"use_sliding_window": False}
    if facts.family == "llama":
        config["mlp_bias"] = facts.mlp_bias
    return config | {"attention_bias": facts.attention_bias}


def _refuse_unwritable(facts):
    qwen2 = facts.family == "qwen2"
    legal = {
        "attention_bias": facts.attention_bias or not qwen2,
        "output_bias": facts.output_bias == (facts.attention_bias and not qwen2),
        "mlp_bias": facts.family == "llama" or not facts.mlp_bias,
        "qk_norm": facts.qk_norm == (facts.family == "qwen3"),
    }
    for name, fine in legal.items():
        if not fine:
            raise ValueError(
                f"{name}={getattr(facts, name)} has no place in a {facts.family} config.json; "
                "choose another family or value"
            )


def _write_scaling(scaling):
    match scaling:
        case None:
            return None
        case RopeScaling(kind="linear"):
            return {"rope_type": "linear", "factor": scaling.factor}
        case RopeScaling(kind="llama3"):
            names = ("low_freq_factor", "high_freq_factor")
            extra = {}
        case _:
            names = ("beta_slow", "beta_fast")
            extra = {"attention_factor": scaling.magnitude}
    return extra | {
        "rope_type": scaling.kind,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_positions,
        names[0]: scaling.low,
        names[1]: scaling.high,
    }
