"""Where a name on the command line becomes a piece of eqrl, and nowhere else."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax
from options import Config, Optim

from eqrl import _optimizer, algorithms
from eqrl._losses.base import AbstractTerm
from eqrl._parse import parse as parse_expression
from eqrl._transform import AbstractTransform


def build_algorithm(config: Config) -> algorithms.Algorithm:
    """The named algorithm, with the expressions of the command line put into it.

    Args:
        config: its `algo` and `rollout` groups are read.

    Raises:
        ValueError: if `--algo.kl` is given to an algorithm without one, or an expression does
            not read.
    """
    algorithm = _named(config)
    kinds = {"advantage": AbstractTransform, "objective": AbstractTerm}
    for part, kind in kinds.items():
        expression = getattr(config.algo, part)
        if expression is not None:
            piece = _read(f"--algo.{part}", expression, kind)
            algorithm = dataclasses.replace(algorithm, **{part: piece})
    return algorithm


def _read(flag: str, expression: str, kind: type) -> Any:
    try:
        piece = parse_expression(expression)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None
    if not isinstance(piece, kind):
        raise ValueError(f"{flag}: `{piece!r}` is another kind of piece; give it to its own flag")
    return piece


def _named(config: Config) -> algorithms.Algorithm:
    name, kl, max_tokens = config.algo.name, config.algo.kl, config.rollout.max_tokens
    own: dict[str, Any] = {} if kl is None else {"kl": kl}
    match name:
        case "grpo":
            return algorithms.grpo(**own)
        case "rloo":
            return algorithms.rloo(**own)
        case "ppo":
            return algorithms.ppo(**own)
        case "reinforce++":
            return algorithms.reinforce_pp(**own)
        case "reinforce++-baseline":
            return algorithms.reinforce_pp_baseline(**own)
    if kl is not None:
        raise ValueError(
            f"--algo.kl has no effect: {name} has no KL term; leave it out, or write one into "
            "--algo.objective"
        )
    match name:
        case "reinforce":
            return algorithms.reinforce()
        case "dapo":
            return algorithms.dapo(max_tokens=max_tokens)
        case "dr_grpo":
            return algorithms.dr_grpo(max_tokens=max_tokens)


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
