"""Rows of the contract table for terms, ratios and weightings; see `members_transforms.py`."""

from members_transforms import Member

from eqrl import _losses as losses


RATIOS = [
    Member(losses.token_ratio),
    Member(losses.sequence_ratio),
    Member(losses.geometric_ratio),
    Member(losses.geometric_token_ratio),
]
TERMS = [
    Member(losses.clipped, {}, {"low": 0.1, "high": 0.3}),
    Member(losses.clipped, {"high": 0.28, "dual": 1.1}, {"dual": 3.0}),
    Member(losses.clipped, {"low": 0, "high": 0}),
    *(Member(losses.clipped, {"ratio": ratio.build()}) for ratio in RATIOS),
    Member(
        losses.clipped,
        {"low": 0.01, "high": 0.02, "ratio": losses.geometric_ratio()},
        {"low": 0.2, "high": 0.3},
    ),
    Member(losses.unclipped),
    Member(losses.unclipped, {"ratio": losses.sequence_ratio()}),
    Member(losses.reinforce),
    Member(losses.cispo, {"max_weight": 1.1}, {"max_weight": 0.9}),
    Member(losses.cispo, {"max_weight": None}),
    Member(losses.cispo, {"max_weight": 1, "ratio": losses.sequence_ratio()}),
    Member(losses.cispo_around_one, {}, {"low": 0.1, "high": 0.1}),
    Member(losses.cispo_around_one, {"low": 0, "high": 0, "ratio": losses.geometric_ratio()}),
    Member(losses.sapo, {}, {"positive": 2.0, "negative": 3.0}),
    Member(losses.sapo, {"positive": 1, "negative": 1}),
    Member(losses.gmpo, {"low": 0.3}, {"low": 0.2, "high": 0.1}),
    Member(losses.gmpo, {"low": 0, "high": 0}),
    Member(losses.dppo, {"low": 0.05, "high": 0.1, "max_weight": 1.2}, {"max_weight": 1.1}),
    Member(losses.dppo, {}, {"low": 0.03, "high": 0.04}),
    Member(losses.dppo, {"max_weight": None}),
    Member(losses.dppo, {"low": 0.01, "high": 0.02, "divergence": "kl"}, {"low": 0, "high": 0}),
    Member(
        losses.vespo,
        {},
        {
            "positive_power": 1.0,
            "positive_decay": 2.0,
            "negative_power": 1.0,
            "negative_decay": 3.0,
        },
    ),
    Member(losses.vespo, {"positive_power": 0, "positive_decay": 0}),
    Member(losses.dro, {"beta": 0.5}, {"beta": 2.0}),
    Member(losses.dro, {"beta": 0}),
    Member(losses.squared_ratio),
    Member(losses.clip_cov),
    Member(
        losses.clip_cov,
        {"share": 0.08, "low": 0.1},
        {"share": 0.15, "low": 1.5, "high": 0.3, "epsilon": 0.1, "seed": 7},
    ),
    Member(losses.kl_cov),
    Member(losses.kl_cov, {"share": 0.2}, {"share": 0.4, "coef": 0.1}),
    Member(losses.positive_nll, {}, {"threshold": 0.5}),
    Member(losses.kl),
    Member(losses.kl, {"estimator": "k1"}),
    Member(losses.kl, {"estimator": "k2"}),
    Member(losses.entropy_bonus),
    Member(losses.value_loss, {}, {"clip": 0.5}),
    Member(losses.value_loss, {"clip": None}),
]
WEIGHTINGS = [
    Member(losses.token_mean),
    Member(losses.token_sum),
    Member(losses.sequence_mean),
    Member(losses.sequence_mean, {"count_empty": True}),
    Member(losses.sequence_sum),
    Member(losses.sequence_sum, {"count_empty": True}),
    Member(losses.constant_length, {"length": 6}, {"length": 3.0}),
    Member(losses.constant_length, {"length": 6, "count_empty": True}, {"length": 3.0}),
]
