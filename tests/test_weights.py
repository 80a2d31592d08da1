"""Checkpoints in and out: safetensors, shards, GGUF, tokenizers, refusals."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from eqrl.models import (
    Architecture,
    Transformer,
    _resolve,
    _save,
    architecture_of,
    known,
    load,
    load_tokenizer,
    save,
    smollm2,
)


GOLDEN = Path(__file__).parent / "golden" / "models"
CASES = sorted(folder.name for folder in GOLDEN.iterdir())


def _copy(name, tmp_path):
    return Path(shutil.copytree(GOLDEN / name, tmp_path / name))


def _logits(model, arrays):
    tokens, positions = (jnp.asarray(arrays[k], jnp.int32) for k in ("tokens", "positions"))
    hidden = model(tokens, positions)
    return np.asarray(hidden @ model.unembedding.T)[arrays["positions"] >= 0]


@pytest.mark.parametrize("name", CASES)
def test_saving_what_transformers_saved_gives_the_same_tensors(name, tmp_path):
    loaded = load(GOLDEN / name)
    assert loaded.stop_ids == (2, 5)
    save(loaded.model, tmp_path / "out", stop_ids=loaded.stop_ids)
    theirs = {}
    for file in (GOLDEN / name).glob("*.safetensors"):
        theirs |= load_file(file)
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for tensor in theirs:
        np.testing.assert_array_equal(ours[tensor], theirs[tensor].astype(np.float32))
    again = load(tmp_path / "out")
    assert eqx.tree_equal(again.model, loaded.model)
    assert again.stop_ids == (2, 5)


def test_shards_and_dtype(tmp_path, monkeypatch):
    model = load(GOLDEN / "llama_scaled").model
    monkeypatch.setattr(_save, "_SHARD_BYTES", 10_000)
    save(model, tmp_path / "out", dtype=jnp.bfloat16)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert max(file.stat().st_size for file in files) < 12_000
    again = load(tmp_path / "out").model
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), model)
    assert eqx.tree_equal(again, rounded)
    half = load(tmp_path / "out", dtype=jnp.bfloat16).model
    assert half.embedding.dtype == jnp.bfloat16
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"


def test_save_replaces_checkpoints_and_nothing_else(tmp_path):
    model = load(GOLDEN / "qwen2_tied").model
    out = tmp_path / "out"
    save(model, out)
    save(jax.tree.map(lambda x: 2 * x, model), out)
    np.testing.assert_array_equal(load(out).model.norm, 2 * model.norm)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "final.tex").write_text("x")
    with pytest.raises(ValueError, match="no checkpoint"):
        save(model, tmp_path / "thesis")


def test_a_crash_while_saving_leaves_the_old_folder(tmp_path):
    class Broken:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    model = load(GOLDEN / "qwen2_tied").model
    with pytest.raises(OSError, match="disk full"):
        save(model, tmp_path / "new", tokenizer=Broken())
    assert list(tmp_path.iterdir()) == []
    save(model, tmp_path / "out")
    with pytest.raises(OSError, match="disk full"):
        save(jax.tree.map(lambda x: 2 * x, model), tmp_path / "out", tokenizer=Broken())
    assert eqx.tree_equal(load(tmp_path / "out").model, model)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _edit(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


DAMAGES = {
    r"lacks the tensor 'model.layers.1.self_attn.k_proj.bias'": lambda t: t.pop(
        "model.layers.1.self_attn.k_proj.bias"
    ),
    r"'model.layers.0.self_attn.q_norm.weight', for which": lambda t: t.update(
        {"model.layers.0.self_attn.q_norm.weight": np.ones(8, np.float32)}
    ),
    r"'model.norm.weight' has shape \(23,\), not \(24,\)": lambda t: t.update(
        {"model.norm.weight": np.ones(23, np.float32)}
    ),
    r"'model.layers.0.mlp.up_proj.weight' has shape \(24, 40\)": lambda t: t.update(
        {"model.layers.0.mlp.up_proj.weight": np.ones((24, 40), np.float32)}
    ),
    r"lacks the tensor 'lm_head.weight'": lambda t: t.pop("lm_head.weight"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_checkpoints_are_refused_by_name(message, tmp_path):
    folder = _copy("qwen2_yarn", tmp_path)
    _edit(folder, DAMAGES[message])
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_copies_of_a_tied_embedding_are_fine_and_others_are_not(tmp_path):
    folder = _copy("llama_linear", tmp_path)
    _edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert load(folder).model.head is None
    _edit(folder, lambda t: t.update({"lm_head.weight": 1 + t["model.embed_tokens.weight"]}))
    with pytest.raises(ValueError, match="lm_head.weight"):
        load(folder)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        load(tmp_path)
    with pytest.raises(ValueError, match="no folder"):
        load(tmp_path / "nowhere")
    folder = _copy("qwen3", tmp_path)
    (folder / "model-00003-of-00006.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00003-of-00006.safetensors is missing"):
        load(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="neither model.safetensors nor its index"):
        load(folder)


def test_architectures_are_read_without_weights_and_without_the_hub(tmp_path, monkeypatch):
    def refuse(name):
        raise AssertionError(f"asked the hub for {name}")

    monkeypatch.setattr(_resolve, "_download", refuse)
    for name in CASES:
        (tmp_path / name).mkdir()
        shutil.copy(GOLDEN / name / "config.json", tmp_path / name)
        assert architecture_of(tmp_path / name) == load(GOLDEN / name).architecture
    repo = "Qwen/Qwen2.5-3B-Instruct"
    assert architecture_of(repo) == known(repo)
    with pytest.raises(ValueError, match="'nobody/nothing' is no local path and not in eqrl's"):
        architecture_of("nobody/nothing")
    with pytest.raises(ValueError, match="no config.json"):
        architecture_of(tmp_path)


def test_hub_ids_without_a_connection_give_one_sentence(tmp_path):
    pytest.importorskip("huggingface_hub")
    # The hub client reads the environment when it is imported, hence the other process.
    code = (
        "from eqrl.models import load\n"
        "try: load('nobody/nothing')\n"
        "except ValueError as error: print(error)"
    )
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "'nobody/nothing' is no local path" in done.stdout
    assert "HF_HUB_OFFLINE is set" in done.stdout
    assert len(done.stdout.strip().splitlines()) == 1


def _interleave(array, head_dim):
    """What llama.cpp's converter does to the rows of q and k of the llama family."""
    halves = array.reshape(-1, 2, head_dim // 2, *array.shape[1:])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(array.shape)


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _write_gguf(gguf, case, file):
    config = json.loads((GOLDEN / case / "config.json").read_text())
    facts, family = Architecture.from_config(config), config["model_type"]
    writer = gguf.GGUFWriter(file, family)
    writer.add_block_count(facts.num_layers)
    writer.add_context_length(facts.max_positions)
    writer.add_embedding_length(facts.width)
    writer.add_feed_forward_length(facts.ff_width)
    writer.add_head_count(facts.num_heads)
    writer.add_head_count_kv(facts.num_kv_heads)
    writer.add_key_length(facts.head_dim)
    writer.add_rope_freq_base(facts.rope_theta)
    writer.add_layer_norm_rms_eps(facts.norm_eps)
    if facts.rope_scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(facts.rope_scaling.factor)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(5)
    for file in sorted((GOLDEN / case).glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            array = tensor.astype(np.float32)
            if family == "llama" and (".q_proj." in name or ".k_proj." in name):
                array = _interleave(array, facts.head_dim)
            for theirs, ours in GGUF_NAMES.items():
                name = name.replace(theirs, ours)
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return facts


@pytest.mark.parametrize("case", ["llama_linear", "qwen2_tied", "qwen3"])
def test_gguf_gives_the_same_model(case, tmp_path):
    gguf = pytest.importorskip("gguf")
    facts = _write_gguf(gguf, case, tmp_path / "model.gguf")
    loaded = load(tmp_path)
    assert loaded.architecture == facts
    assert loaded.stop_ids == (2, 5)
    assert loaded.folder == tmp_path / "model.gguf"
    assert architecture_of(tmp_path / "model.gguf") == facts
    assert eqx.tree_equal(loaded.model, load(GOLDEN / case).model)


def test_gguf_rope_scaling_that_cannot_run_is_refused(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma2")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.ones((3, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="'gemma2' is not supported"):
        load(tmp_path / "model.gguf")


@pytest.fixture(scope="module")
def smol():
    pytest.importorskip("gguf")
    try:
        smollm2()
    except ValueError as error:
        pytest.skip(str(error))
    return load("smollm2")


@pytest.fixture(scope="module")
def smol_tokenizer(smol):
    pytest.importorskip("transformers")
    return load_tokenizer(smol)


def test_smollm2_is_the_known_one(smol):
    assert smol.architecture == known("HuggingFaceTB/SmolLM2-135M-Instruct")


def test_smollm2_knows_paris(smol, smol_tokenizer):
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = smol_tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    answer = smol_tokenizer("The capital of France is Paris.<|im_end|>")["input_ids"]
    row = jnp.asarray([prompt + answer], jnp.int32)
    hidden = smol.model(row, jnp.arange(row.shape[1], dtype=jnp.int32)[None])
    greedy = jnp.argmax(hidden[0] @ smol.model.unembedding.T, axis=-1)
    assert greedy[len(prompt) - 1 : -1].tolist() == answer
    assert answer[-1] in smol.stop_ids


TEXTS = [
    "Hello  world, 12345+67 = 12412!\n\tdef f(x): return x  é 漢字 🙂 it's   ",
    "<|im_start|>user\nhi<|im_end|>\n",
    "",
]


def test_smollm2_tokenizer(smol, smol_tokenizer, tmp_path):
    for text in TEXTS:
        ids = smol_tokenizer(text)["input_ids"]
        assert smol_tokenizer.decode(ids) == text
    assert smol_tokenizer.tokenize("a 123") == ["a", "Ġ", "1", "2", "3"]
    assert smol_tokenizer(TEXTS[1])["input_ids"][0] == smol_tokenizer.bos_token_id == 1
    assert smol_tokenizer.eos_token_id == 2
    smol_tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert again(text)["input_ids"] == smol_tokenizer(text)["input_ids"]
    assert again.chat_template == smol_tokenizer.chat_template


def test_tokenizer_is_saved_beside_the_weights(smol_tokenizer, tmp_path):
    facts = Architecture("llama", 19, 16, 1, 4, 2, 4, 24)
    model = Transformer.init(facts, key=jax.random.key(0))
    save(model, tmp_path / "out", tokenizer=smol_tokenizer, stop_ids=(2,))
    loaded = load(tmp_path / "out")
    assert loaded.architecture == facts and loaded.stop_ids == (2,)
    assert load_tokenizer(loaded)("2+2")["input_ids"] == smol_tokenizer("2+2")["input_ids"]
