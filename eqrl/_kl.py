"""Per-token estimators of the KL divergence from a reference policy."""

import jax.numpy as jnp

from ._types import PerToken


KL_ESTIMATORS = ("k1", "k2", "k3")


def kl_estimate(difference: PerToken, estimator: str) -> PerToken:
    r"""One sample's estimate of $KL(\pi \| \pi_{ref})$ in nats, per token.

    With $d = \log\pi - \log\pi_{ref}$ on a token drawn from $\pi$: `k1` is $d$ (unbiased, of
    either sign), `k2` is $d^2/2$, `k3` is $e^{-d} + d - 1$ (unbiased, never negative). None is
    clamped: a clamp has no gradient exactly on the tokens that drifted most.

    Args:
        difference: $d$, finite everywhere; set it to 0 on unmasked positions beforehand.
        estimator: `"k1"`, `"k2"` or `"k3"`.

    Returns:
        The estimate; 0 where `difference` is 0.

    Source: Schulman, "Approximating KL divergence", 2020.
    """
    match estimator:
        case "k1":
            return difference
        case "k2":
            return 0.5 * difference**2
        case "k3":
            return jnp.expm1(-difference) + difference
    raise ValueError(f"estimator={estimator!r} is not known; pass one of {KL_ESTIMATORS}")
