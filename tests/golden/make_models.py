"""Writes the golden checkpoints of `tests/test_models.py` with torch and transformers.

    python tests/golden/make_models.py            # writes tests/golden/models/<case>/
    python tests/golden/make_models.py --check DIR  # does transformers read what eqrl saved?

Each case is a random checkpoint of a few thousand weights as `transformers` itself saves it,
`config.json` included, and `arrays.npz` with its inputs and what each component made of them in
float32. Rows are padded on the left, on the right and in the middle; values on padding are
whatever transformers computes there and mean nothing. Needs torch and transformers, not eqrl.

`--check DIR` expects `DIR/<case>/` as written by `eqrl.models.save` and compares logits.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)


HERE = Path(__file__).parent / "models"
SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e3,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
BIAS = {"attention_bias": True}
UNTIED = {"tie_word_embeddings": False}
TIED = {"tie_word_embeddings": True}
CASES = {
    "qwen2_tied": (Qwen2Config, TIED | {"rope_parameters": {"rope_theta": 1e6}}),
    "qwen2_yarn": (Qwen2Config, UNTIED | {"rope_parameters": YARN}),
    "qwen3": (Qwen3Config, UNTIED | {"head_dim": 16}),
    "qwen3_bias": (Qwen3Config, TIED | BIAS | {"head_dim": 8, "num_key_value_heads": 4}),
    "llama_scaled": (
        LlamaConfig,
        UNTIED | BIAS | {"mlp_bias": True, "head_dim": 8, "rope_parameters": LLAMA3},
    ),
    "llama_linear": (LlamaConfig, TIED | {"num_key_value_heads": 1, "rope_parameters": LINEAR}),
}


def randomize(model, seed, half):
    """Weights large enough that attention is peaked and every bias and gain matters.

    With `half` they are bfloat16 numbers, so that storing them as such loses nothing. (Casting
    the whole model there and back would also round the rotary frequencies, which are no weights.)
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(1.0 + 0.2 * noise)
            elif name.endswith("bias"):
                weight.copy_(0.3 * noise)
            else:
                weight.copy_(noise * weight.shape[-1] ** -0.5 * 1.5)
            if half:
                weight.copy_(weight.bfloat16())


def inputs(seed):
    """Three rows: padded left, padded right, padded at both ends and in the middle."""
    rng = np.random.default_rng(seed)
    positions = np.full((3, 12), -1)
    for row, columns in enumerate((range(4, 12), range(9), (1, 2, 3, 6, 7, 8, 10))):
        positions[row, list(columns)] = np.arange(len(columns))
    return rng.integers(0, SMALL["vocab_size"], positions.shape), positions


def run(model, tokens, positions):
    """Logits and what every component returned, by hooks."""
    seen = {}

    def keep(name):
        def hook(module, args, output):
            seen[name] = (output[0] if isinstance(output, tuple) else output).detach().numpy()

        return hook

    model.model.embed_tokens.register_forward_hook(keep("embedding"))
    model.model.norm.register_forward_hook(keep("final"))
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(keep(f"attention_{i}"))
        layer.mlp.register_forward_hook(keep(f"feed_forward_{i}"))
    with torch.no_grad():
        seen["logits"] = model(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor((positions >= 0).astype(np.int64)),
            position_ids=torch.tensor(np.maximum(positions, 0)),
        ).logits.numpy()
    return seen


def make(name, seed):
    config_class, options = CASES[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        config_class(**SMALL | options), attn_implementation="eager", dtype=torch.float32
    ).eval()
    half = name == "qwen2_tied"
    randomize(model, seed, half)
    tokens, positions = inputs(seed)
    arrays = run(model, tokens, positions)
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.generation_config = GenerationConfig(eos_token_id=[2, 5])
    stored = model.bfloat16() if half else model
    stored.save_pretrained(folder, max_shard_size="15KB" if name == "qwen3" else "5GB")
    np.savez_compressed(folder / "arrays.npz", tokens=tokens, positions=positions, **arrays)


def check(root):
    for name in CASES:
        arrays = np.load(HERE / name / "arrays.npz")
        model = AutoModelForCausalLM.from_pretrained(
            root / name, attn_implementation="eager", dtype=torch.float32
        ).eval()
        logits = run(model, arrays["tokens"], arrays["positions"])["logits"]
        real = arrays["positions"] >= 0
        np.testing.assert_allclose(logits[real], arrays["logits"][real], rtol=1e-5, atol=1e-5)
        print(name, "opens with equal logits; eos", model.generation_config.eos_token_id)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", type=Path)
    root = parser.parse_args().check
    if root is not None:
        check(root)
    else:
        for seed, case in enumerate(CASES):
            make(case, seed)
