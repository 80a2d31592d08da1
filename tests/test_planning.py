"""`--dry-run` and `--plan`: the programs of a run as shapes, and what is said of them."""

import dataclasses
import importlib.util
import json
import re
from typing import Any

import equinox as eqx
import jax
import planning
import pytest
from config import parse
from shapes import shapes_of
from training import train

import eqrl
from eqrl import models, sharding
from eqrl.sharding import plan as planner


FACTS = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 512,
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "tie_word_embeddings": True, "max_position_embeddings": 2048, "eos_token_id": 2,
}  # fmt: skip
PROMPT, NEW = 16, 8
WORDS = (
    *("--rollout.prompts", "4", "--rollout.samples", "4"),
    *("--rollout.max-tokens", str(NEW), "--data.max-prompt-tokens", str(PROMPT)),
)


@pytest.fixture
def folder(tmp_path):
    """A model of which there is only its configuration."""
    return _folder(tmp_path)


def _folder(path, **changes):
    (path / "config.json").write_text(json.dumps(FACTS | changes))
    return str(path)


def _config(folder, *words):
    where = () if "--plan" in words else ("--dry-run",)
    return parse([*WORDS, "--model", folder, *where, *words])


def _planned(folder, capsys, *words):
    """Exit status, all that was printed, and the block of each program."""
    status = planning.plan(_config(folder, *words), folder)
    text = capsys.readouterr().out
    assert "\n\n\n" not in text
    blocks = [block for block in text.split("\n\n") if "\n  HBM " in block]
    return status, text, {block.partition("\n")[0]: block for block in blocks}


def _assert_each_fits(blocks):
    for name, block in blocks.items():
        assert re.search(r"\n  HBM      [\d.]+ of [\d.]+ GiB: fits \(arg", block), name
        assert re.search(r"\n  work     [\d.e-]+ TFLOP, .* memory read and written", block), name
        assert "\n  sends    " in block, name


def _tflop(block):
    """Of one device, to three digits."""
    return float(re.findall(r"work +([\d.e-]+) TFLOP", block)[0])


def _update_flops(rows, *, buffer, critic=False, layers=2):
    """Forward and twice that backward of each model, and the head's four products."""
    layer = 64 * (2 * 64 + 2 * 2 * 16 + 3 * 128)
    time = PROMPT + NEW
    forward = layers * (2 * rows * time * layer + 4 * rows * time**2 * 64)
    return (3 * forward) * (2 if critic else 1) + 8 * buffer * 64 * 512


# --- on this machine ------------------------------------------------------------------------------


def test_a_dry_run_on_a_mesh_names_every_program_and_makes_nothing(folder, capsys):
    before = len(jax.live_arrays())
    status, text, blocks = _planned(folder, capsys, "--mesh", "fsdp=4,tensor=2")
    assert status == 0
    # A few scalars of the optimizer at most.
    assert sum(x.nbytes for x in jax.live_arrays()[before:]) < 100
    assert list(blocks) == ["weights for sampling", "prefill", "decode", "ref", "update"]
    _assert_each_fits(blocks)
    assert "mesh fsdp=4,tensor=2, weights while sampling data=4,tensor=2\n" in text
    assert (
        "4 prompts x 4 samples of 16 + 8 tokens; 1 rollout passes of 4 prompts; 1 updates" in text
    )
    assert "all-gather" in blocks["weights for sampling"] and "not built: logits" in text
    assert "largest micro-batch that fits: 4 sequences a device, --optim.micro-batch-per" in text
    assert re.search(r"\neverything fits\ncompiled in \d+ s\n$", text)
    flops = _update_flops(16, buffer=16 * NEW) / 8 / 1e12
    assert _tflop(blocks["update"]) == pytest.approx(flops, rel=6e-3)


def test_ppo_on_one_device_has_old_log_probs_and_values(folder, capsys):
    status, text, blocks = _planned(folder, capsys, "--algo.name", "ppo")
    assert status == 0
    assert list(blocks) == ["prefill", "decode", "old/ref/values", "update x 8"]
    _assert_each_fits(blocks)
    assert "\nmesh 1\n" in text and "while sampling" not in text
    flops = _update_flops(4, buffer=4 * NEW, critic=True) / 1e12
    assert _tflop(blocks["update x 8"]) == pytest.approx(flops, rel=6e-3)


# --- what the programs are given ------------------------------------------------------------------


def _shapes(folder, *words, capacity=None):
    config = _config(folder, *words)
    topology = planner.here()
    if capacity is not None:
        chip = dataclasses.replace(topology.chip, hbm_bytes=capacity)
        topology = dataclasses.replace(topology, chip=chip)
    return shapes_of(config, topology, models.architecture_of(folder))


def _program(name, **changes):
    given: dict[str, Any] = dict.fromkeys(
        ("argument_bytes", "output_bytes", "alias_bytes", "temporary_bytes", "code_bytes",
         "resident_bytes", "flops"), 0,
    )  # fmt: skip
    given |= {"devices": 1, "calls": 1, "capacity": 1000}
    return planner.ProgramPlan(name, **(given | changes))


@pytest.fixture
def asked(monkeypatch, request):
    """What would be compiled, in place of compiling it.

    A row of an update takes 100 bytes; arguments count too with the parameter `True`.
    """
    calls, weighed = [], getattr(request, "param", False)

    def plan_program(name, function, args, *, topology, mesh, **options):
        calls.append((name, args, mesh, options))
        micro = -1
        if name == "update":
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                text = str(function.trace(*args).jaxpr)
            rows = args[1].weights.shape[0]
            split = re.search(rf"bool\[(\d+),(\d+),{PROMPT + NEW}\]", text)
            assert split and int(split[1]) * int(split[2]) >= rows  # padded
            micro = int(split[1]) // sharding.row_shards(mesh)
        kept = {k: options[k] for k in ("calls", "resident_bytes") if k in options}
        return _program(
            name,
            argument_bytes=sharding.device_bytes(args) if weighed else 0,
            temporary_bytes=100 * max(micro, 0),
            capacity=topology.chip.hbm_bytes,
            **kept,
        )

    monkeypatch.setattr(planning.planner, "plan_program", plan_program)
    return calls


def _on_first(tree):
    """Bytes of real arrays on the first device."""
    first = jax.devices()[0]
    arrays = jax.tree.leaves(eqx.filter(tree, eqx.is_array))
    return sum(s.data.nbytes for x in arrays for s in x.addressable_shards if s.device == first)


def test_programs_are_told_what_else_is_in_memory(folder, asked):
    """Against a real state on the real mesh."""
    shapes = _shapes(folder, "--mesh", "fsdp=4,tensor=2", "--rollout.passes", "2")
    assert [p.name for p in planning._programs(shapes)] == [
        "weights for sampling", "prefill", "decode", "ref", "update",
    ]  # fmt: skip
    policy = models.Transformer.init(shapes.architecture, key=jax.random.key(0))
    real = eqrl.init(policy, shapes.algorithm, shapes.optimizer)
    state = _on_first(sharding.place(real, shapes.mesh, policy.architecture))
    own = _on_first(sharding.place(policy, shapes.mesh, policy.architecture))
    found = {name: (args, mesh, options) for name, args, mesh, options in asked}
    residents = {name: options["resident_bytes"] for name, (_, _, options) in found.items()}
    # A copy of the weights is an argument while sampling, beside the state and the reference.
    assert residents["prefill"] == residents["decode"] == state + own
    assert residents["ref"] == state - own
    assert residents["update"] == own
    assert found["decode"][1] == shapes.sampling_mesh != shapes.mesh == found["update"][1]
    assert (found["prefill"][2]["while_trips"], found["decode"][2]["while_trips"]) == (1, NEW)
    # Two prompts a pass are padded to the four row shards: one pass.
    assert found["decode"][2]["calls"] == 1
    # Two prompts a pass on four row shards, and all of a step's rows on those.
    assert found["decode"][0][1].tokens.shape == (4, PROMPT)
    rollout = found["ref"][0][3]
    assert rollout.tokens.shape == (16, PROMPT + NEW)
    assert rollout.tokens.sharding.shard_shape(rollout.tokens.shape) == (4, PROMPT + NEW)
    gathered = [args[0].shape for name, args, _, _ in asked if name == "weights for sampling"]
    assert len(gathered) == len(jax.tree.leaves(policy))


def test_without_a_mesh_sampling_uses_the_weights_of_the_state(folder, asked):
    shapes = _shapes(folder)
    list(planning._programs(shapes))
    policy = models.Transformer.init(shapes.architecture, key=jax.random.key(0))
    real = eqrl.init(policy, shapes.algorithm, shapes.optimizer)
    decode = next(options for name, _, _, options in asked if name == "decode")
    assert decode["resident_bytes"] == _on_first(real)  # less the policy, plus the reference


@pytest.mark.parametrize(
    ("asked_for", "capacity", "largest"), [("1", 450, 4), ("2", 10**6, 16), ("8", 450, 4)]
)
def test_the_largest_micro_batch_is_found(folder, asked, asked_for, capacity, largest):
    shapes = _shapes(folder, "--optim.micro-batch-per-device", asked_for, capacity=capacity)
    shapes = dataclasses.replace(shapes, reference=None)
    update = planning._update(shapes, int(asked_for))
    text = planning._advice(shapes, [update])
    assert f"largest micro-batch that fits: {largest} sequences a device" in text
    assert f"--optim.micro-batch-per-device {largest}" in text
    assert ("(the whole minibatch)" in text) == (largest == 16)
    assert all(options["quick"] for _, _, _, options in asked[1:])
    assert text.endswith("everything fits" if update.fits else "the run does not fit")


@pytest.mark.parametrize(
    ("name", "words", "changes", "said"),
    [
        # 800 bytes for 4 prompts, and room for 500.
        ("decode", (), {"temporary_bytes": 800, "resident_bytes": 500}, "--rollout.passes 2"),
        ("prefill", (), {"temporary_bytes": 800, "resident_bytes": 750}, "--rollout.passes 4"),
        ("decode", (), {"argument_bytes": 1200}, "fsdp=-1/tensor=2,data=-1"),
        ("update", (), {"temporary_bytes": 1200}, "try --optim.remat"),
        ("update", ("--optim.remat",), {"temporary_bytes": 1200}, "--mesh fsdp=-1), or take more"),
        ("ref", (), {"argument_bytes": 1200}, "--mesh fsdp=-1), or take more devices"),
    ],
)
def test_what_does_not_fit_is_told_what_would_help(folder, name, words, changes, said):
    program = _program(name, **changes)
    assert not program.fits
    assert said in planning._knob(_shapes(folder, *words), program)


@pytest.mark.parametrize("asked", [True], indirect=True)
def test_what_is_far_too_large_is_planned_all_the_same(tmp_path, capsys, asked):
    """A table of a terabyte: nothing of it may ever exist."""
    wide = _folder(tmp_path, vocab_size=2**24, hidden_size=2**14)
    words = ("--algo.name", "reinforce", "--mesh", "auto")
    status, text, blocks = _planned(wide, capsys, *words)
    assert status == 1 and list(blocks) == ["prefill", "decode", "update"]
    assert [name for name, *_ in asked][:3] == list(blocks)
    assert all(re.search(r"does not fit by [\d,]{3,}", block) for block in blocks.values())
    assert "\ndecode does not fit: cut the weights while sampling, for instance --mesh " in text
    assert "\nupdate does not fit with one sequence a device: try --optim.remat\n" in text
    assert (
        "mesh auto: fsdp=4,tensor=2:" in text and "nothing fits, and this holds the least" in text
    )
    assert "\nthe run does not fit\n" in text and "everything fits" not in text


# --- what was asked for ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--plan", "v9-8"), "^error: topology 'v9-8' does not exist; the nearest is .*[^\n]$"),
        (("--dry-run", "--mesh", "fsdp=3"), "^error: mesh 'fsdp=3' has 3 devices, .*[^\n]$"),
        (("--dry-run", "--model", "nowhere/at-all"), "^error: .*nowhere/at-all.*[^\n]$"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(words, match, capsys):
    def build(config):
        raise AssertionError("a plan needs no data")

    with pytest.raises(SystemExit) as exit:
        train(parse([*WORDS, *words]), build)
    assert exit.value.code == 2
    assert re.search(match, capsys.readouterr().err.rstrip("\n"))


def test_a_plan_is_reached_by_its_flag_and_reads_no_data(monkeypatch, folder, tmp_path):
    found = []
    monkeypatch.setattr(planning, "plan", lambda *given: found.append(given) or 1)
    run = tmp_path / "run"
    config = _config(folder, "--run-dir", str(run))
    assert config.plan == "here"
    assert train(config, lambda config: pytest.fail("no data is read")) == 1
    assert found == [(config, folder)] and not run.exists()


# --- on chips that are not here -------------------------------------------------------------------


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)
@pytest.mark.usefixtures("no_compilation_cache")
def test_a_plan_for_a_tpu(folder, capsys):
    words = ("--plan", "v6e-8", "--mesh", "fsdp=4,tensor=2")
    status, text, blocks = _planned(folder, capsys, *words)
    assert status == 0
    assert list(blocks) == ["weights for sampling", "prefill", "decode", "ref", "update"]
    _assert_each_fits(blocks)
    assert "on v6e-8: 8 x v6e, hosts: 1; 31.24 GiB each, 918 TFLOP/s and 1640 GB/s (http" in text
    assert all("\n  at least " in block for block in blocks.values())
    assert re.search(r"a step takes at least [\d.]+ s \(weights for .*, decode .* tokens per", text)
    assert "prefill" not in re.findall(r"a step takes .*", text)[0], "decode has it already"
    flops = _update_flops(16, buffer=16 * NEW) / 8 / 1e12
    assert _tflop(blocks["update"]) == pytest.approx(flops, rel=6e-3)


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="the CUDA plugin of jax is not installed",
)
@pytest.mark.usefixtures("no_compilation_cache")
def test_a_plan_for_gpus(tmp_path, capsys):
    folder = _folder(tmp_path, num_hidden_layers=1)
    words = ("--plan", "h200-8", "--mesh", "data=-1", "--algo.name", "reinforce")
    status, text, blocks = _planned(folder, capsys, *words)
    assert status == 0 and list(blocks) == ["prefill", "decode", "update"]
    _assert_each_fits(blocks)
    assert "on h200-8: 8 x h200, hosts: 1; 131.32 GiB each, 989 TFLOP/s" in text
    assert "all-reduce" in blocks["update"]
    flops = _update_flops(16, buffer=16 * NEW, layers=1) / 8 / 1e12
    assert _tflop(blocks["update"]) == pytest.approx(flops, rel=6e-3)
