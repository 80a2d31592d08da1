"""Held-out accuracy, strict and lenient, greedy or sampled, of any number of problems."""

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.random as jr
import numpy as np
from asking import ask
from config import Config
from layout import Meshes, to_sample
from spread import join, own_share
from task import Task

import eqrl
from eqrl import data, rewards, samplers, tracking


# Completions a pass. A constant: accuracy must not depend on how training is batched.
_ROWS = 64


class Encoded(NamedTuple):
    """Records and their prompts' tokens, those too long left out."""

    records: list[Mapping[str, Any]]
    tokens: list[list[int]]


def encode(
    records: Sequence[Mapping[str, Any]], tokenizer: Any, system: str | None, limit: int
) -> Encoded:
    """Chat-templates and tokenizes every question; leaves out, and counts, the too long ones."""
    tokens = data.encode_prompts([r["question"] for r in records], tokenizer, system=system)
    kept = data.fit_prompts(tokens, limit, drop=True)
    return Encoded([records[i] for i in kept], [tokens[i] for i in kept])


class Evaluator:
    """Samples held-out problems and scores them.

    Attributes:
        samples: completions of the last evaluation, for reading.
    """

    def __init__(
        self,
        held_out: Encoded,
        task: Task,
        stop_ids: tuple[int, ...],
        tokenizer: Any,
        config: Config,
        weights: Sequence[float],
        meshes: Meshes,
        sampler: samplers.Sampler,
    ):
        self._held_out, self._task, self._tokenizer = held_out, task, tokenizer
        self._config, self._weights, self._meshes = config, weights, meshes
        self._sampler = sampler
        self._sampling = samplers.Sampling(
            config.eval.samples,
            config.rollout.max_tokens or 1,
            stop_ids,
            config.eval.temperature,
        )
        self.samples: list[tracking.Sample] = []

    def light(self, state: eqrl.TrainState) -> dict[str, float]:
        """`eval/*` on the first `--eval.prompts` problems."""
        return self._evaluate(state, self._config.eval.prompts, "eval")

    def full(self, state: eqrl.TrainState) -> dict[str, float]:
        """`eval_full/*` on `--eval.full` problems (0 = all), and the same numbers as `eval/*`."""
        if self._config.eval.full is None:
            return {}
        found = self._evaluate(state, self._config.eval.full, "eval_full")
        found["eval_full/accuracy"] = found["eval_full/acc_strict"]
        same = {name.replace("_full", "", 1): x for name, x in found.items()}
        return {name: x for name, x in same.items() if name.startswith("eval/")} | found

    def _evaluate(self, state: eqrl.TrainState, count: int, prefix: str) -> dict[str, float]:
        start = time.perf_counter()
        size = len(self._held_out.records)
        chosen = range(min(count or size, size))
        rollout = self._complete(state, chosen)
        records = [self._held_out.records[i] for i in chosen for _ in range(self._sampling.samples)]
        judge = functools.partial(self._judge, rollout=rollout, records=records)
        scored = judge(self._task.rewards)
        verdict = judge([self._task.strict, self._task.lenient]).components
        names = rewards.reward_names(self._task.rewards)
        self._keep(chosen, rollout, dict(zip(names, scored.components.T, strict=True)))
        lengths = rollout.mask.sum(axis=1)
        total = rewards.weighted(scored.components, self._weights)
        found = {
            f"{prefix}/acc_strict": float(verdict[:, 0].mean()),
            f"{prefix}/acc_lenient": float(verdict[:, 1].mean()),
            f"{prefix}/reward/total/mean": float(total.mean()),
            f"{prefix}/len_mean": float(lengths.mean()),
            f"{prefix}/truncated_frac": float(rollout.truncated.mean()),
            f"{prefix}/problems": float(len(chosen)),
            f"{prefix}/reward_fn_failures": float(scored.errors + scored.timeouts),
        }
        for name, mean in zip(names, scored.components.mean(axis=0), strict=True):
            found[f"{prefix}/reward/func/{name}/mean"] = float(mean)
        correct = verdict[:, 1].reshape(len(chosen), -1)
        samples = correct.shape[1]
        for k in {2**i for i in range(samples.bit_length())} | {samples}:
            found[f"{prefix}/pass@{k}"] = eqrl.estimate_pass_at_k(correct, k)
        return found | {f"time/{prefix}": time.perf_counter() - start}

    def _complete(self, state: eqrl.TrainState, chosen: Sequence[int]) -> Any:
        """A rollout of NumPy arrays, sampled a constant number of rows a pass."""
        policy = to_sample(state.policy, self._meshes, self._sampler)
        tokens = [self._held_out.tokens[i] for i in chosen]
        width = max(map(len, self._held_out.tokens))
        asked = ask(
            self._sampler,
            policy,
            eqrl.pad_prompts(tokens, list(chosen), width=width),
            self._sampling,
            # Not the training seed: evaluation draws from a stream of its own.
            key=jr.key(self._config.seed + 2**16),
            size=max(1, _ROWS // self._sampling.samples),
            meshes=self._meshes,
            version=int(state.updates),
        )
        return jax.tree.map(np.asarray, asked.result())

    def _texts(self, rollout: Any, rows: slice) -> list[str]:
        """Completions, with what tools have said in between."""
        arrays = rollout.tokens, rollout.mask, rollout.positions
        tokens, mask, positions = (x[rows] for x in arrays)
        return data.decode_completions(tokens, mask, self._tokenizer, positions=positions)

    def _judge(self, functions: Sequence[rewards.Reward], *, rollout, records):
        """Every completion by every function; each process judges its own share."""
        own = own_share(len(records))
        texts = self._texts(rollout, own)
        timeout = self._config.reward.timeout
        scored = rewards.score(functions, texts, records[own], timeout=timeout)
        return join(scored, len(records))

    def _keep(self, chosen: Sequence[int], rollout, components) -> None:
        """The first completion of the first problems."""
        first = slice(0, 16 * self._sampling.samples, self._sampling.samples)
        texts = self._texts(rollout, first)
        self.samples = [
            tracking.Sample(
                str(self._held_out.records[i]["question"]),
                text,
                str(self._held_out.records[i]["answer"]),
                {name: float(x[first][row]) for name, x in components.items()},
            )
            for row, (i, text) in enumerate(zip(chosen, texts, strict=False))
        ]
