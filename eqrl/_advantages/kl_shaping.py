"""A KL cost that leaves the batch's mean advantage alone."""

from .._checks import check_number
from .._masked import zero_unmasked
from .._transform import Stateless, stateless
from .._types import PerToken, Rollout, ScalarLike
from ._statistics import centre
from .kl_penalty import reference_gap


def kl_shaping(coef: ScalarLike) -> Stateless:
    r"""Moves advantage from tokens far above the reference policy to those below it.

    $A_t \leftarrow A_t + coef \cdot (\bar d - d_t)$ with
    $d_t = \log\pi_{old}(t) - \log\pi_{ref}(t)$ and $\bar d$ its mean over the masked tokens of the
    whole batch, so long completions weigh more than short ones. $\log\pi_{old}$ is
    `rollout.old_logprobs`, or the sampler's `rollout.logprobs` where that is absent. The sum over
    the batch's tokens does not change, and where all $d_t$ are equal (a single token, the policy
    equal to the reference) nothing changes at all. Put it behind the baseline. Unmasked positions
    get 0.

    Differs between libraries: this is tinker's form, which can also add up the discounted future
    of the term: `kl_shaping` does not.

    Args:
        coef: advantage per nat, not negative.

    Returns:
        A transform from advantages to advantages; requires `rollout.ref_logprobs`.

    Source: the tinker cookbook's KL penalty; the estimator is k1 of Schulman 2020.
    """
    check_number("coef", coef, least=0)
    return stateless(_kl_shaping, builder=kl_shaping, requires=("ref_logprobs",), coef=coef)


def _kl_shaping(signal: PerToken, rollout: Rollout, *, coef: ScalarLike) -> PerToken:
    mask = rollout.mask
    excess, _ = centre(reference_gap(rollout, signal.dtype).ravel(), mask.ravel())
    return zero_unmasked(signal - coef * excess.reshape(mask.shape), mask)
