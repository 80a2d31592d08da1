"""Where a name on the command line becomes a piece of eqrl, and nowhere else."""

import dataclasses
import functools
import importlib.util
import inspect
import pathlib
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import optax
from options import Config, Optim

import eqrl
from eqrl import _optimizer, algorithms
from eqrl._losses.base import AbstractTerm
from eqrl._losses.weighting import Weighting
from eqrl._parse import parse as parse_expression
from eqrl._select.base import AbstractSelection
from eqrl._transform import AbstractTransform


def build_algorithm(config: Config) -> algorithms.Algorithm:
    """The named algorithm, with the expressions of the command line put into it.

    Args:
        config: its `algo`, `rollout`, `reward` and `plugins` are read.

    Raises:
        ValueError: if `--algo.kl` is given to an algorithm without one, or an expression does
            not read.
    """
    algorithm = _named(config)
    kinds = {
        "advantage": AbstractTransform,
        "objective": AbstractTerm,
        "target": AbstractTransform,
        "weighting": Weighting,
        "selection": AbstractSelection,
    }
    names = plugin_builders(config.plugins)
    for part, kind in kinds.items():
        expression = getattr(config.algo, part)
        if expression is not None:
            piece = _read(f"--algo.{part}", expression, kind, names)
            algorithm = dataclasses.replace(algorithm, **{part: piece})
    return algorithm


def _read(flag: str, expression: str, kind: type, names: Mapping[str, Callable]) -> Any:
    try:
        piece = parse_expression(expression, names=names)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None
    if not isinstance(piece, kind):
        raise ValueError(f"{flag}: `{piece!r}` is another kind of piece; give it to its own flag")
    return piece


@functools.cache
def plugin_builders(plugins: tuple[str, ...]) -> dict[str, Callable]:
    """The public functions and pieces of each plugin, by name; later plugins win.

    Args:
        plugins: modules as `import` names them (from the working directory too), or .py files.

    Raises:
        ValueError: naming a plugin that cannot be imported, and why.
    """
    found = {}
    for plugin in plugins:
        try:
            module = _import(plugin)
        except (Exception, SystemExit) as error:  # whatever it raises is one sentence here
            raise ValueError(f"--plugins {plugin}: {type(error).__name__}: {error}") from None
        found |= {
            name: x
            for name, x in vars(module).items()
            if (inspect.isfunction(x) or inspect.isclass(x))
            and x.__module__ == module.__name__
            and not name.startswith("_")
        }
    taken = sorted(found.keys() & vars(eqrl).keys())
    if taken:
        raise ValueError(f"--plugins: `{taken[0]}` is a name of eqrl's own; choose another")
    return found


def _import(plugin: str) -> types.ModuleType:
    if not plugin.endswith(".py"):
        sys.path.insert(0, str(pathlib.Path.cwd()))
        try:
            return importlib.import_module(plugin)
        finally:
            sys.path.pop(0)
    path = pathlib.Path(plugin)
    name = f"plugin_{path.stem}"  # a file may bear the name of a module that is loaded already
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look annotations up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


# What takes a KL coefficient, what takes the completion limit, and what takes neither.
_WITH_KL = {
    "grpo": algorithms.grpo,
    "ppo": algorithms.ppo,
    "reinforce++": algorithms.reinforce_pp,
    "reinforce++-baseline": algorithms.reinforce_pp_baseline,
    "remax": algorithms.remax,
    "rloo": algorithms.rloo,
}
_WITH_LIMIT = {"dapo": algorithms.dapo, "dr_grpo": algorithms.dr_grpo}


def _named(config: Config) -> algorithms.Algorithm:
    name, kl = config.algo.name, config.algo.kl
    if name in _WITH_KL:
        return _WITH_KL[name]() if kl is None else _WITH_KL[name](kl=kl)
    if kl is not None:
        raise ValueError(
            f"--algo.kl has no effect: {name} has no KL term; leave it out, or write one into "
            "--algo.objective"
        )
    if name in _WITH_LIMIT:
        return _WITH_LIMIT[name](max_tokens=config.rollout.max_tokens)
    match name:
        case "gdpo":  # components without a weight do not reach an algorithm
            return algorithms.gdpo(*(w for w in config.reward.weights if w != 0))
        case "pkpo":  # half of the samples: a group then says something of k attempts
            return algorithms.pkpo(max(2, (config.rollout.samples or 2) // 2))
    return getattr(algorithms, name)()


def build_optimizer(config: Config, updates: int) -> optax.GradientTransformation:
    """The optimizer over the pair `(policy, critic)`; its state is float32.

    Args:
        config: resolved; its `optim` group is read.
        updates: optimizer updates of the whole run, which the schedule counts.
    """
    optim = config.optim
    rate, decay = schedule(config, optim.lr, updates), optim.weight_decay
    match optim.name:
        case "adamw":
            policy = optax.adamw(rate, weight_decay=decay, mask=_optimizer.matrices)
        case "lion":
            policy = optax.lion(rate, weight_decay=decay, mask=_optimizer.matrices)
        case "sgd":
            decayed = optax.add_decayed_weights(decay, _optimizer.matrices)
            policy = optax.chain(decayed, optax.sgd(rate))
        case "muon":
            policy = _optimizer.muon(rate, weight_decay=decay)
    # A critic regresses to numbers, wherever its policy comes from: always AdamW.
    critic = optax.adamw(
        schedule(config, optim.critic_lr or 0.0, updates),
        weight_decay=decay,
        mask=_optimizer.matrices,
    )
    pair = _optimizer.actor_critic(_clipped(policy, optim), _clipped(critic, optim))
    return _optimizer.float32_state(pair)


def _clipped(inner: optax.GradientTransformation, optim: Optim) -> optax.GradientTransformation:
    if optim.clip_norm == 0:
        return inner
    return optax.chain(optax.clip_by_global_norm(optim.clip_norm), inner)


def schedule(config: Config, peak: float, updates: int) -> Callable:
    """The rate as a function of the updates done so far."""
    if config.optim.schedule == "constant":
        return optax.constant_schedule(peak)
    return _optimizer.warmup_cosine(peak, updates, warmup_updates=warmup_updates(config, updates))


def warmup_updates(config: Config, updates: int) -> int:
    return int(round(updates * (config.optim.warmup_ratio or 0.0)))
