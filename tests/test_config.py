"""The examples' command line: what it accepts, what it refuses with which words, what follows."""

import dataclasses
import os
import subprocess
import sys

import config as cli
import pytest
import yaml
from build import build_algorithm

from eqrl import algorithms, sharding


NAMES = ("reinforce", "ppo", "grpo", "rloo", "dapo", "reinforce++", "reinforce++-baseline")
ALL = (
    *NAMES, "dr_grpo", "cispo", "clip_cov", "dppo", "gdpo", "gmpo", "gpg", "gspo", "kl_cov",
    "lite_ppo", "luspo", "m2po", "max_rl", "opo", "pkpo", "remax", "sapo", "vapo", "vespo",
)  # fmt: skip


def _run(root, *words, **environment):
    """The command line in a process of its own, in which touching any device would fail."""
    code = "import config; print(config.describe(config.parse(), 1000))"
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        cwd=root / "examples",
        env=os.environ
        | {"JAX_PLATFORMS": "nonexistent", "COLUMNS": "110", "PYTHONPATH": str(root)}
        | environment,
    )


def refused(capsys, *words) -> str:
    """What the command line says on refusing these words."""
    with pytest.raises(SystemExit) as exit:
        cli.parse(words)
    assert exit.value.code == 2
    captured = capsys.readouterr()
    return " ".join((captured.err + captured.out).split())


def leaves(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in tree.items():
        inner = leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else None
        flat |= {prefix + name: value} if inner is None else inner
    return flat


def test_help_fits_two_screens(root):
    done = _run(root, "--help")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 120
    for flag in ("--algo.name", "--model", "--data.path", "--steps", "--run-dir", "--seed"):
        assert flag in done.stdout
    for flag in ("--resume", "--print-config", "--config", "--policy-loss-impl"):
        assert flag in done.stdout


def test_at_most_sixty_fields():
    assert 40 < len(leaves(dataclasses.asdict(cli.Config()))) <= 60


def test_describe_touches_no_device_and_the_check_can_fail(root):
    done = _run(root, "--algo.name", "reinforce++", "--steps", "0")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["derived"]["updates"] == 0
    touch = subprocess.run(
        [sys.executable, "-c", "import jax; jax.numpy.ones(1)"],
        capture_output=True,
        env=os.environ | {"JAX_PLATFORMS": "nonexistent"},
    )
    assert touch.returncode != 0


@pytest.mark.parametrize("name", ALL)
def test_choosing_a_name_chooses_the_algorithm(name):
    algorithm = build_algorithm(cli.parse(["--algo.name", name]))
    expected = {
        "reinforce": algorithms.reinforce(),
        "ppo": algorithms.ppo(),
        "grpo": algorithms.grpo(),
        "rloo": algorithms.rloo(),
        "dapo": algorithms.dapo(max_tokens=64),
        "reinforce++": algorithms.reinforce_pp(),
        "reinforce++-baseline": algorithms.reinforce_pp_baseline(),
        "dr_grpo": algorithms.dr_grpo(max_tokens=64),
        "pkpo": algorithms.pkpo(4),  # half of the demo's eight samples
    }
    build = expected.get(name) or getattr(algorithms, name)()
    assert repr(algorithm) == repr(build)


def test_no_two_names_build_the_same_algorithm():
    built = [repr(build_algorithm(cli.parse(["--algo.name", name]))) for name in ALL]
    assert len(set(built)) == len(ALL)


def test_a_name_on_the_command_line_wins_over_yaml_and_changes_the_estimator(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("algo: {name: grpo, kl: 0.1}\noptim: {lr: 3e-6}\nsteps: 7\n")
    chosen = cli.parse(["--algo.name", "reinforce++", "--config", str(file)])
    assert repr(build_algorithm(chosen)) == repr(algorithms.reinforce_pp(kl=0.1))
    # PyYAML reads 3e-6 as a string; the flag's parser does not.
    assert chosen.optim.lr == 3e-6
    assert chosen.steps == 7


def test_expressions_replace_parts_and_print_back():
    words = ["--algo.advantage", "rloo() | whiten() | clip(5.0)"]
    words += ["--algo.objective", "clipped(0.1, 0.3) + 0.5 * kl()"]
    chosen = cli.parse(words)
    algorithm = build_algorithm(chosen)
    assert repr(algorithm.advantage) == "rloo() | whiten() | clip(5.0)"
    described = yaml.safe_load(cli.describe(chosen))
    assert described["algo"]["advantage"] == "rloo() | whiten() | clip(5.0)"
    assert described["derived"]["algorithm"]["objective"] == repr(algorithm.objective)


def test_weighting_and_selection_are_expressions_too(capsys):
    words = ["--algo.weighting", "constant_length(64)"]
    words += ["--algo.selection", "drop_constant_groups() & drop_truncated()"]
    algorithm = build_algorithm(cli.parse(words))
    assert repr(algorithm.weighting) == "constant_length(64)"
    assert repr(algorithm.selection) == "drop_constant_groups() & drop_truncated()"
    assert "its own flag" in refused(capsys, "--algo.weighting", "rloo()")
    assert "its own flag" in refused(capsys, "--algo.selection", "token_mean()")


def test_targets_and_old_log_probs():
    chosen = cli.parse(
        ["--algo.name", "ppo", "--algo.advantage", "turn_gae() | whiten()"]
        + ["--algo.target", "turn_returns()", "--algo.old-logprobs", "sampler"]
    )
    algorithm = build_algorithm(chosen)
    assert repr(algorithm.target) == "turn_returns()"
    assert chosen.algo.old_logprobs == "sampler"


def test_a_surrogate_gets_updates_in_which_it_differs():
    for name, updates in (("grpo", 1), ("gspo", 2), ("m2po", 2), ("vapo", 8)):
        assert cli.derived(cli.parse(["--algo.name", name]))["updates_per_step"] == updates


def test_gdpo_takes_the_weights_of_the_rewards():
    chosen = cli.parse(["--algo.name", "gdpo", "--reward.weights", "1", "0", "0.25"])
    assert repr(build_algorithm(chosen).advantage) == "gdpo(1.0, 0.25) | batch_norm()"


PLUGIN = """
from __future__ import annotations
import equinox as eqx
import jax.numpy as jnp
import eqrl

def doubled(factor=2.0):
    return eqrl.stateless(_doubled, builder=doubled, factor=factor)

def _doubled(signal, rollout, *, factor):
    return factor * signal

class nothing(eqrl.AbstractTransform):
    words: str = "none"

    def init(self):
        return None

    def update(self, signal, state, rollout):
        return signal, state
"""


def test_plugins_bring_their_pieces_by_file_and_by_module(tmp_path, monkeypatch):
    (tmp_path / "of_mine.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    text = "doubled(factor=3.0) | nothing(words='some') | rloo()"
    for plugin in ("of_mine.py", str(tmp_path / "of_mine.py"), "of_mine"):
        chosen = cli.parse(["--plugins", plugin, "--algo.advantage", text])
        algorithm = build_algorithm(chosen)
        assert repr(algorithm.advantage) == text
        # What a run logs can be run again.
        file = tmp_path / "run.yaml"
        file.write_text(cli.describe(chosen))
        assert cli.parse(["--config", str(file)]) == chosen


def test_a_plugin_that_does_not_load_is_one_sentence(tmp_path, capsys):
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0")
    assert "ZeroDivisionError" in refused(capsys, "--plugins", str(broken))
    assert "no_such_module" in refused(capsys, "--plugins", "no_such_module")
    assert "FileNotFoundError" in refused(capsys, "--plugins", "nowhere.py")
    taken = tmp_path / "taken.py"
    taken.write_text("def clip():\n    pass\n")
    assert "`clip` is a name of eqrl's own" in refused(capsys, "--plugins", str(taken))
    leaves_early = tmp_path / "config.py"  # also the name of a module that is loaded
    leaves_early.write_text("raise SystemExit(3)")
    assert "SystemExit" in refused(capsys, "--plugins", str(leaves_early))
    # Only what the module itself defines: `eqx` and `_doubled` are no builders.
    own = tmp_path / "own.py"
    own.write_text(PLUGIN)
    for name in ("_doubled", "eqx"):
        words = ("--plugins", str(own), "--algo.advantage", f"{name}()")
        assert f"there is no `{name}`" in refused(capsys, *words)


def test_what_print_config_writes_can_be_run(tmp_path):
    words = ["--algo.name", "dapo", "--optim.schedule", "warmup_cosine", "--eval.full", "None"]
    words += ["--reward.weights", "1", "0", "0.25", "--data.system-prompt", "--- be brief"]
    chosen = cli.parse(words)
    file = tmp_path / "run.yaml"
    file.write_text(cli.describe(chosen, 1000))
    again = cli.parse(["--config", str(file)])
    assert again == chosen
    assert cli.resolve(again) == again


def test_zero_is_legal_where_it_means_something():
    zeros = ("steps", "seed", "eval.every", "eval.full", "checkpoint.every", "checkpoint.keep")
    zeros += ("optim.weight-decay", "optim.clip-norm", "optim.micro-batch", "optim.lr", "algo.kl")
    words = [word for name in zeros for word in (f"--{name}", "0")]
    chosen = leaves(dataclasses.asdict(cli.parse(words)))
    assert {chosen[name.replace("-", "_")] for name in zeros} == {0}


def test_derived_numbers():
    words = ["--algo.name", "ppo", "--rollout.prompts", "6", "--rollout.samples", "4"]
    words += ["--steps", "10", "--optim.micro-batch", "4", "--optim.schedule", "warmup_cosine"]
    words += ["--optim.warmup-ratio", "0.1", "--rollout.max-tokens", "50"]
    numbers = cli.derived(cli.parse(words), dataset_size=240)
    expected = {
        "sequences_per_step": 24,
        "tokens_per_step_at_most": 1200,
        "epochs": 2,
        "minibatch_sequences": 6,
        "micro_batch_sequences": 4,
        "accumulation_steps": 2,
        "updates_per_step": 8,
        "updates": 80,
        "schedule_updates": 80,
        "warmup_updates": 8,
        "prompts_seen": 60,
        "dataset_epochs": 0.25,
    }
    assert {name: numbers[name] for name in expected} == expected


def test_print_config_shows_the_whole_table_of_the_batch():
    words = ["--rollout.prompts", "6", "--rollout.samples", "4", "--rollout.passes", "3"]
    words += ["--optim.micro-batch-per-device", "2"]
    chosen = cli.parse(words)
    alone = yaml.safe_load(cli.describe(chosen))["derived"]
    assert set(sharding.plan_batch(sequences_per_step=6, prompts_per_step=6).table()) <= set(alone)
    spread = yaml.safe_load(cli.describe(chosen, row_shards=8, processes=2))["derived"]
    names = ("sequences_per_step", "prompts_per_pass", "sequences_per_device", "row_shards")
    names += ("micro_batch_sequences", "accumulation_steps", "padded_update_sequences")
    assert [alone[name] for name in names] == [24, 2, 8, 1, 2, 12, 0]
    assert [spread[name] for name in names] == [24, 2, 1, 8, 16, 2, 8]
    plan = cli.batch_plan(chosen, row_shards=8, processes=2)
    assert {name: spread[name] for name in plan.table()} == plan.table()


def test_a_mesh_that_a_micro_batch_does_not_fill_is_refused_by_flag():
    chosen = cli.parse(["--optim.micro-batch", "12"])
    assert cli.batch_plan(chosen, row_shards=4).accumulation_steps == 11
    with pytest.raises(ValueError, match=r"--optim.micro-batch 12 .*=8; .* --optim.micro-batch 8$"):
        cli.batch_plan(chosen, row_shards=8)


@pytest.mark.parametrize(
    ("words", "names", "remedy"),
    [
        ("--rollout.samples 1", "--rollout.samples 1", "--rollout.samples 2"),
        ("--algo.name dapo --algo.kl 0.1", "--algo.kl", "--algo.objective"),
        ("--algo.name rloo --algo.kl 1 --algo.advantage rloo()", "--algo.kl", "expression"),
        ("--optim.critic-lr 1e-3", "--optim.critic-lr", "--algo.name ppo"),
        ("--algo.max-refills 2", "--algo.max-refills", "--algo.name dapo"),
        ("--algo.minibatches 7", "--algo.minibatches 7", "--algo.minibatches 8"),
        ("--optim.micro-batch 99 --algo.minibatches 2", "-batch 99", "--optim.micro-batch 64"),
        ("--optim.micro-batch 8 --optim.micro-batch-per-device 4", "-batch 8", "-per-device 8"),
        ("--rollout.passes 9", "--rollout.passes 9", "--rollout.passes 8"),
        ("--rollout.passes 0", "--rollout.passes 0", "at least 1"),
        ("--algo.epochs 0", "--algo.epochs 0", "at least 1"),
        ("--steps -1", "--steps -1", "at least 0"),
        ("--optim.lr nan", "--optim.lr nan", "at least 0"),
        ("--reward.timeout 0", "--reward.timeout", "above 0"),
        ("--rollout.temperature 0", "--rollout.temperature", "above 0"),
        ("--eval.samples 4", "--eval.samples 4", "--eval.temperature 1"),
        ("--optim.warmup-ratio 0.1", "--optim.warmup-ratio", "--optim.schedule warmup_cosine"),
        ("--resume nowhere", "--resume", "auto, never or a run folder"),
        ("--algo.advantage gae()", "values", "--algo.name ppo"),
        ("--algo.name ppo --algo.objective clipped()", "trains no critic", "value_loss()"),
        ("--algo.advantage clipped()", "--algo.advantage", "its own flag"),
        ("--algo.objective cliped()", "--algo.objective", "`clipped`"),
        ("--config nowhere.yaml", "--config", "YAML file"),
        ("--algo.nmae ppo", "--algo.nmae", "--algo.name"),
        ("--algo.name reinforce+", "reinforce+", "'reinforce++'"),
        ("--steps many", "--steps", "many"),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(capsys, words, names, remedy):
    said = refused(capsys, *words.split())
    assert names in said
    assert remedy in said


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("rollout: {promts: 3}", "rollout.promts", "rollout.prompts"),
        ("rollout: {batch_size: 3}", "rollout.batch_size", "rollout.prompts"),
        ("optim: {learning_rate: 3e-6}", "optim.learning_rate", "optim.lr"),
        ("micro_batch_size: 3", "micro_batch_size", "optim.micro_batch"),
        ("algo: ppo", "algo", "algo.name"),
        ("stepz: 1", "stepz", "steps"),
    ],
)
def test_an_unknown_yaml_key_is_refused_with_the_nearest(capsys, tmp_path, text, key, nearest):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    said = refused(capsys, "--config", str(file))
    assert f"unknown key {key!r}" in said
    assert f"nearest is {nearest!r}" in said


def test_a_yaml_value_of_the_wrong_kind_is_refused(capsys, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("optim: {lr: fast}")
    assert "--optim.lr" in refused(capsys, "--config", str(file))
    file.write_text("- 1\n- 2\n")
    assert "name: value" in refused(capsys, "--config", str(file))
    file.write_text("a: [")
    assert "is not YAML" in refused(capsys, "--config", str(file))


def test_later_files_and_both_spellings_of_keys(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("steps: 3\nrun-dir: here\n")
    second.write_text("steps: 4\nprint_config: true\n")
    chosen = cli.parse([f"--config={first}", "--config", str(second)])
    assert (chosen.steps, chosen.run_dir, chosen.print_config) == (4, "here", True)


def test_a_script_may_add_flags():
    @dataclasses.dataclass(frozen=True)
    class Args(cli.Config):
        task: str = "products"

    chosen = cli.parse(["--task", "sums", "--steps", "2"], Args)
    assert (chosen.task, chosen.steps) == ("sums", 2)
