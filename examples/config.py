"""From the command line to a configuration that can run, and to every number that follows from it.

`parse` merges `--config run.yaml` below the command line, `resolve` fills what was left open and
refuses what cannot work, `derived` computes what follows, and `describe` prints it all. None of
them touches a device. The groups and their help are in `options.py`; `build.py` turns names into
pieces of eqrl.
"""

import dataclasses
import datetime
import difflib
import math
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import tyro
import yaml
from backends import build_backend
from build import (
    build_algorithm,
    build_optimizer,
    plugin_builders,
    schedule,
    warmup_updates,
)
from options import Config, Distributed

from eqrl import algorithms, sharding


__all__ = [
    "Config",
    "batch_plan",
    "build_algorithm",
    "build_optimizer",
    "derived",
    "describe",
    "parse",
    "required",
    "resolve",
    "schedule",
]

AnyConfig = TypeVar("AnyConfig", bound=Config)


def parse(argv: Sequence[str] | None = None, cls: type[AnyConfig] = Config) -> AnyConfig:
    """Reads the command line, resolved and checked.

    Args:
        argv: words of the command line; those of the process by default.
        cls: a dataclass that extends `Config`, for a script with flags of its own.

    Returns:
        The resolved configuration. What cannot work ends the process with status 2 and one
        sentence on standard error, as unknown flags do.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        words = list(_expand(argv, cls))
        config = tyro.cli(cls, args=words, config=(tyro.conf.FlagCreatePairsOff,))
        return resolve(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _expand(argv: list[str], cls: type) -> Iterator[str]:
    """`argv` with `--config FILE` replaced by the file's flags, in front, and `--dry-run`."""
    own, files = [], []
    words = iter(argv)
    for word in words:
        if word == "--config":
            files.append(next(words, ""))
        elif word.startswith("--config="):
            files.append(word.removeprefix("--config="))
        elif word == "--dry-run":
            own += ["--plan", "here"]
        else:
            own.append(word)
    for file in files:
        yield from _flags_of(file, cls)
    yield from own


def _flags_of(file: str, cls: type) -> Iterator[str]:
    """The YAML file as command-line words, so that one parser checks both."""
    if not pathlib.Path(file).is_file():
        raise ValueError(f"--config {file!r} is not a file; give the path of a YAML file")
    try:
        content = yaml.safe_load(pathlib.Path(file).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"--config {file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config {file} must hold `name: value` lines")
    content.pop("derived", None)  # what `--print-config` wrote; it is computed anew
    known = list(_leaves(cls))
    for name, value in _flatten(content):
        if name not in known:
            raise ValueError(f"{file}: unknown key {name!r}; nearest is {_nearest(name, known)!r}")
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            yield from [flag] * value
        elif isinstance(value, list):
            yield from (flag, *map(str, value))
        else:
            yield f"{flag}={value}"


def _flatten(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{prefix}{key}".replace("-", "_")
        if isinstance(value, dict):
            yield from _flatten(value, f"{name}.")
        else:
            yield name, value


def _leaves(cls: type, prefix: str = "") -> Iterator[str]:
    """The dotted name of every flag."""
    for field in dataclasses.fields(cls):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from _leaves(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


# What people have typed elsewhere for the same thing; difflib could not guess these.
_ELSEWHERE = {
    "batch_size": "rollout.prompts",
    "learning_rate": "optim.lr",
    "max_new_tokens": "rollout.max_tokens",
    "max_length_sample": "rollout.max_tokens",
    "model_path": "model",
    "micro_batch_size": "optim.micro_batch",
    "micro_batch_size_per_device": "optim.micro_batch_per_device",
    "grad_accum_steps": "optim.micro_batch",
    "n": "rollout.samples",
    "ppo_epochs": "algo.epochs",
    "beta": "algo.kl",
}


def _nearest(name: str, known: list[str]) -> str:
    group, _, leaf = name.rpartition(".")
    if leaf in _ELSEWHERE:
        return _ELSEWHERE[leaf]
    # The names of the same group first: a wrong leaf is likelier than a wrong group.
    siblings = [other for other in known if other.rpartition(".")[0] == group]
    inside = [other for other in known if other.startswith(f"{name}.")]
    if inside:
        return inside[0]
    return difflib.get_close_matches(name, siblings or known, n=1, cutoff=0.0)[0]


def resolve(config: AnyConfig) -> AnyConfig:
    """Fills what was left open from the model and the algorithm, and checks the whole.

    Resolving twice changes nothing.

    Raises:
        ValueError: one sentence that names the flag and the remedy.
    """
    config = _fill(config)
    algorithm = build_algorithm(config)
    critic = "values" in algorithm.requires
    _check_numbers(config)
    _check_algorithm(config, algorithm, critic)
    _check_rest(config)
    if critic and config.optim.critic_lr is None:
        rate = 5e-4 if config.model == "demo" else 1e-5
        optim = dataclasses.replace(config.optim, critic_lr=rate)
        config = dataclasses.replace(config, optim=optim)
    return config


# On the first update every surrogate has the same gradient; these are chosen for what comes after.
_SURROGATES = {
    "gspo", "luspo", "cispo", "sapo", "gmpo", "dppo", "vespo", "clip_cov", "kl_cov", "m2po",
}  # fmt: skip


def _fill(config: AnyConfig) -> AnyConfig:
    demo = config.model == "demo"
    name = config.algo.name
    time = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    warmup = 0.05 if config.optim.schedule == "warmup_cosine" else None
    return dataclasses.replace(
        config,
        steps=_or(config.steps, 40 if demo else 100),
        run_dir=_or(config.run_dir, f"runs/{time}-{name}"),
        algo=_filled(
            config.algo,
            epochs=2 if name in ("ppo", "vapo") else 1,
            minibatches=4 if name in ("ppo", "vapo") else 2 if name in _SURROGATES else 1,
            max_refills=3 if name == "dapo" else None,
        ),
        data=_filled(config.data, eval_split="held_out" if config.data.path == "demo" else "test"),
        rollout=_filled(
            config.rollout,
            prompts=16 if demo else 4,
            samples=8 if demo else 4,
            max_tokens=64 if demo else 256,
        ),
        optim=_filled(config.optim, lr=1e-4 if demo else 1e-6, warmup_ratio=warmup),
    )


def _or(value, default):
    # Not `value or default`: zero is a legal value.
    return default if value is None else value


def _filled(group, **defaults):
    """The group with `None` replaced by these."""
    chosen = {name: _or(getattr(group, name), value) for name, value in defaults.items()}
    return dataclasses.replace(group, **chosen)


def _check_numbers(config: Config) -> None:
    """Each number against the least it may be. Zero is legal wherever it means something."""
    least = {
        "algo.epochs": 1,
        "algo.minibatches": 1,
        "data.max_prompt_tokens": 1,
        "rollout.prompts": 1,
        "rollout.samples": 1,
        "rollout.passes": 1,
        "rollout.max_tokens": 1,
        "eval.prompts": 1,
        "eval.samples": 1,
        "distributed.num_processes": 1,
        "distributed.timeout": 1,
    }
    for name in _leaves(type(config)):
        value = _look_up(config, name)
        if isinstance(value, int | float) and not value >= least.get(name, 0):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} {value} is too small; give at least {least.get(name, 0)}")


def _look_up(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _check_algorithm(config: Config, algorithm: algorithms.Algorithm, critic: bool) -> None:
    algo, rollout, name = config.algo, config.rollout, config.algo.name
    if rollout.samples < algorithm.min_group:
        raise ValueError(
            f"--rollout.samples {rollout.samples}: {name} compares the completions of a prompt; "
            f"give at least --rollout.samples {algorithm.min_group}"
        )
    batch_plan(config)
    if critic and algorithm.target is None:
        raise ValueError(
            f"--algo.advantage or --algo.objective reads a critic's values, but {name} trains "
            "none; use --algo.name ppo"
        )
    if critic and "values" not in algorithm.objective.requires:
        raise ValueError(
            f"--algo.objective {algorithm.objective!r} trains no critic, but the advantage or the "
            "target reads its values; add ` + 0.5 * value_loss()`"
        )
    if algo.epochs * algo.minibatches > 1 and "reinforce()" in repr(algorithm.objective):
        flag = "--algo.epochs" if algo.epochs > 1 else "--algo.minibatches"
        raise ValueError(
            f"{flag}: the objective {algorithm.objective!r} has no ratio, so a second update on a "
            'rollout would be biased; add --algo.objective "clipped()"'
        )
    if config.optim.critic_lr is not None and not critic:
        raise ValueError(
            f"--optim.critic-lr has no effect: {name} trains no critic; leave it out, or use "
            "--algo.name ppo"
        )
    if rollout.overlap and not _corrected(config, algorithm):
        raise ValueError(
            f"--rollout.overlap {rollout.overlap}: completions come from an older policy, and "
            f"nothing in {name} corrects for that; add {_correction(algorithm)}"
        )
    if algo.max_refills is not None and algorithm.selection is None:
        raise ValueError(
            f"--algo.max-refills has no effect: {name} trains on every completion; leave it out, "
            "or use --algo.name dapo"
        )
    if algo.kl is not None and _print(algorithm) == _print(_with_kl(config, algo.kl + 1.0)):
        raise ValueError(
            "--algo.kl has no effect: --algo.advantage or --algo.objective replaces the part "
            "that reads it; write the coefficient into the expression"
        )


# What weighs tokens by how much likelier they are now than when they were sampled.
_CORRECTIONS = re.compile(r"\b(tis|tis_sequence|icepop)\(")


def _corrected(config: Config, algorithm: algorithms.Algorithm) -> bool:
    objective = repr(algorithm.objective)
    # Against the sampler's own log-probs, the surrogate's ratio is the whole correction.
    from_sampler = config.algo.old_logprobs == "sampler" and "reinforce()" not in objective
    return from_sampler or _CORRECTIONS.search(objective) is not None


def _correction(algorithm: algorithms.Algorithm) -> str:
    if "reinforce()" in repr(algorithm.objective):
        return f'--algo.objective "tis(2.0) * ({algorithm.objective!r})"'
    return "--algo.old-logprobs sampler"


def _check_rest(config: Config) -> None:
    if config.plan and config.distributed != Distributed():
        raise ValueError(
            "--distributed has no effect on --plan, which runs in one process; leave it out"
        )
    build_backend(config.rollout.backend, plugin_builders(config.plugins))
    if not config.rollout.temperature > 0:
        raise ValueError("--rollout.temperature 0 explores nothing; give a number above 0")
    if not all(math.isfinite(weight) for weight in config.reward.weights):
        raise ValueError(f"--reward.weights {config.reward.weights} must be finite numbers")
    if not config.reward.timeout > 0:
        raise ValueError("--reward.timeout 0 fails every sample; give seconds above 0")
    if config.eval.temperature == 0 and config.eval.samples > 1:
        raise ValueError(
            f"--eval.samples {config.eval.samples}: greedy completions of a problem are all "
            "equal; add --eval.temperature 1"
        )
    ratio = config.optim.warmup_ratio
    if ratio is not None and config.optim.schedule == "constant":
        raise ValueError(
            "--optim.warmup-ratio has no effect on a constant rate; add "
            "--optim.schedule warmup_cosine"
        )
    if ratio is not None and not ratio < 1:
        raise ValueError(f"--optim.warmup-ratio {ratio} is no share; give a number below 1")
    resume = config.resume
    if resume not in ("auto", "never") and not pathlib.Path(resume).is_dir():
        raise ValueError(f"--resume {resume!r} is no folder; give auto, never or a run folder")


def _with_kl(config: Config, kl: float) -> algorithms.Algorithm:
    algo = dataclasses.replace(config.algo, kl=kl)
    return build_algorithm(dataclasses.replace(config, algo=algo))


def _print(algorithm: algorithms.Algorithm) -> dict[str, str]:
    """The algorithm's parts as the expressions that build them."""
    fields = dataclasses.fields(algorithm)
    return {field.name: repr(getattr(algorithm, field.name)) for field in fields}


# Where the command line says a quantity of the batch; the others are derived.
_BATCH_FLAGS = {
    "prompts_per_step": "rollout.prompts",
    "samples_per_prompt": "rollout.samples",
    "rollout_passes": "rollout.passes",
    "epochs": "algo.epochs",
    "minibatches": "algo.minibatches",
    "micro_batch_sequences": "optim.micro_batch",
    "micro_batch_sequences_per_device": "optim.micro_batch_per_device",
}


def batch_plan(config: Config, *, row_shards: int = 1, processes: int = 1) -> sharding.BatchPlan:
    """How the configuration's sequences are spread over passes, micro-batches and devices.

    Args:
        config: resolved.
        row_shards: the parts that the mesh cuts rows into.
        processes: JAX processes.

    Raises:
        ValueError: if the numbers contradict each other, or do not fit the mesh; one sentence that
            names both flags and the nearest valid value.
    """
    # Zero is "open" for the two sizes of a micro-batch, and too small for all others.
    given = {name: _look_up(config, flag) or None for name, flag in _BATCH_FLAGS.items()}
    try:
        return sharding.plan_batch(**given, row_shards=row_shards, processes=processes)
    except ValueError as error:
        raise ValueError(re.sub(r"\b(\w+)=(\d+)", _as_flag, str(error))) from None


def _as_flag(match: re.Match[str]) -> str:
    """`micro_batch_sequences=4` as `--optim.micro-batch 4`; what has no flag stays."""
    flag = _BATCH_FLAGS.get(match[1])
    return match[0] if flag is None else f"--{flag.replace('_', '-')} {match[2]}"


def derived(
    config: Config, dataset_size: int | None = None, *, row_shards: int = 1, processes: int = 1
) -> dict[str, Any]:
    """Every number that follows from a resolved configuration.

    Args:
        config: resolved.
        dataset_size: number of training problems, if known.
        row_shards: the parts that the mesh cuts rows into.
        processes: JAX processes.
    """
    plan = batch_plan(config, row_shards=row_shards, processes=processes)
    total = config.steps * plan.updates_per_step
    rollouts = 1 + (config.algo.max_refills or 0)
    constant = config.optim.schedule == "constant"
    numbers = plan.table() | {
        "rollouts_per_step_at_most": rollouts,
        "tokens_per_step_at_most": plan.sequences_per_step * config.rollout.max_tokens * rollouts,
        "updates": total,
        "schedule_updates": 0 if constant else total,
        "warmup_updates": 0 if constant else warmup_updates(config, total),
        "prompts_seen": config.steps * plan.prompts_per_step,
    }
    if dataset_size is not None:
        numbers["dataset_size"] = dataset_size
        numbers["dataset_epochs"] = round(numbers["prompts_seen"] / max(dataset_size, 1), 3)
    return numbers


def describe(
    config: Config, dataset_size: int | None = None, *, row_shards: int = 1, processes: int = 1
) -> str:
    """The resolved configuration and what follows from it, as YAML that `--config` reads back.

    Args:
        config: resolved.
        dataset_size: number of training problems, if known.
        row_shards: the parts that the mesh cuts rows into.
        processes: JAX processes.
    """
    tree = dataclasses.asdict(config)
    del tree["print_config"]
    algorithm = build_algorithm(config)
    numbers = derived(config, dataset_size, row_shards=row_shards, processes=processes)
    tree["derived"] = numbers | {"algorithm": _print(algorithm)}
    tree["derived"]["requires"] = sorted(required(config, algorithm))
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=100)


def required(config: Config, algorithm: algorithms.Algorithm) -> frozenset[str]:
    """What a rollout has to carry: what the algorithm reads, and what several updates do."""
    several = (
        {"old_logprobs"}
        if (config.algo.epochs or 1) * (config.algo.minibatches or 1) > 1
        else set()
    )
    given = {"old_logprobs"} if config.algo.old_logprobs == "sampler" else set()
    return frozenset(algorithm.requires | several) - given


class _Dumper(yaml.SafeDumper):
    """Writes tuples as lists on one line."""


_Dumper.add_representer(
    tuple, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True)
)
