"""The carriers that travel through the library, and what a token position means.

Every array of one batch of sequences has the dims `"batch time"`. Column `t` of a row is one
*token position*. Four facts hold everywhere:

- `tokens[b, t]` is the token that stands at `t`: prompt, completion, or padding.
- `mask[b, t]` is True exactly where **the policy chose the token**, the stop token included.
  The sampler writes it; nothing ever infers it from a pad id. It may have gaps (tool output).
- `logprobs[b, t]` is the log-probability **of token `t`** given the tokens before it.
- `positions[b, t]` is the token's index in its sequence (what rotary embeddings see), and -1 on
  padding. Nothing outside `samplers/` may assume at which columns prompt or completion stand.

A row with no True in `mask` is an empty row: it trains nothing and enters no statistic.
"""

from typing import TypeAlias

import equinox as eqx
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped


Tokens: TypeAlias = Int[Array, "batch time"]
Mask: TypeAlias = Bool[Array, "batch time"]
PerToken: TypeAlias = Float[Array, "batch time"]
PerRow: TypeAlias = Float[Array, " batch"]
Metrics: TypeAlias = dict[str, Float[Array, ""]]
# A hyperparameter of a transform or a term: a Python number, or a traced scalar under `vmap`.
ScalarLike: TypeAlias = bool | int | float | Float[Array, ""] | Int[Array, ""]


def wide(dtype: DTypeLike) -> jnp.dtype:
    """The type that sums over `dtype` are kept in: float64 for float64, else float32."""
    return jnp.dtype(dtype) if jnp.finfo(dtype).bits > 32 else jnp.dtype(jnp.float32)


class Rollout(eqx.Module):
    """What was sampled, and what was measured of it before any learning.

    Attributes:
        tokens: prompt, completion and padding of every row.
        mask: True where the policy chose the token (see the module docstring).
        positions: index of the token in its sequence, -1 on padding.
        logprobs: log-probs reported by the sampler, at the sampling temperature; anything on
            unmasked positions is ignored.
        group: completions of one prompt share an id. Ids are row indices in `[0, batch)`: any
            labelling that uses such numbers is legal, in any order.
        truncated: True where the completion ended without a stop token.
        rewards: raw, unweighted reward components, one column a reward function. Selection and
            reward statistics read these; shaping and weights never touch them.
        old_logprobs: the trainer's own log-probs of the policy that sampled. `None` when the
            rollout serves a single update: then the current log-probs, gradient stopped, stand in.
        ref_logprobs: log-probs under the frozen reference policy, if something requires them.
        values: the critic's predictions at sampling time, if something requires them.
        version: the update count of the policy that sampled each row.
        old_entropy: entropy in nats of the distribution that each token was drawn from, under the
            policy that sampled, with the trainer's own numerics.
        sum_pi_squared: sum over the vocabulary of the squared probabilities of that distribution.
        greedy_rewards: total reward of a greedy completion of each row's prompt.
    """

    tokens: Tokens
    mask: Mask
    positions: Tokens
    logprobs: PerToken
    group: Int[Array, " batch"]
    truncated: Bool[Array, " batch"]
    rewards: Float[Array, "batch component"] | None = None
    old_logprobs: PerToken | None = None
    ref_logprobs: PerToken | None = None
    values: PerToken | None = None
    version: Int[Array, " batch"] | None = None
    old_entropy: PerToken | None = None
    sum_pi_squared: PerToken | None = None
    greedy_rewards: PerRow | None = None

    def need(self, field: str) -> Shaped[Array, "batch *rest"]:
        """The optional field `field`, or a `ValueError` that names it and its remedy."""
        value = getattr(self, field)
        if value is None:
            filled = "store it when sampling"
            if field in ("old_logprobs", "old_entropy", "sum_pi_squared", "ref_logprobs", "values"):
                filled = "fill it with `eqrl.annotate(...)`"
            raise ValueError(
                f"this algorithm reads `rollout.{field}`, which is None; {filled} or choose a part "
                f"that does not require {field!r}"
            )
        return value


class Batch(eqx.Module):
    """All that a loss may read: the rollout, its advantages, and the reduction as numbers.

    Attributes:
        rollout: the rollout the advantages belong to.
        advantages: one per token, zero on unmasked positions.
        weights: the reduction. `loss = sum(weights * value)`; computed once on all rows of one
            optimizer step, so that any split into micro-batches sums to the same gradient.
        share: `mask / sum(mask)` over the same rows, so `sum(share * x)` is this part's exact
            contribution to the token mean of `x`.
        targets: value targets (returns), if the algorithm trains a critic.
        prepared: what the objective computed once on all rows of the rollout, for its terms to
            read back: a tree of arrays `[batch time]` in the shape of the objective.
    """

    rollout: Rollout
    advantages: PerToken
    weights: PerToken
    share: PerToken
    targets: PerToken | None = None
    prepared: PyTree = None

    def mean(self, x: Shaped[Array, "batch time"]) -> Float[Array, ""]:
        """This part's contribution to the token mean of `x`; contributions of parts add up."""
        return jnp.sum(self.share * jnp.where(self.rollout.mask, x, 0).astype(self.share.dtype))


class Scores(eqx.Module):
    """What the policy (and critic) in training say of the rollout's tokens.

    Attributes:
        logprobs: log-prob of each masked token; zero elsewhere.
        entropy: entropy in nats of the distribution each masked token was drawn from; zero
            elsewhere.
        values: the critic's prediction before each masked token, if there is a critic.
    """

    logprobs: PerToken
    entropy: PerToken
    values: PerToken | None = None
