"""The rows of the contract table for factors: `test_contract_factors.py` says what each keeps."""

from members_transforms import Member

from eqrl import _losses as losses
from eqrl._select import drop_truncated


FACTORS = [
    Member(losses.tis, {}, {"cap": 1.05}),
    Member(losses.tis, {"cap": 1.05}),
    Member(losses.tis_sequence, {"cap": 1.1}, {"cap": 0.9}),
    Member(losses.clamp_weights, {"low": 0.9, "high": 1.1}, {"low": 1.0, "high": 1.01}),
    Member(losses.icepop, {"low": 0.9, "high": 1.1}, {"low": 1.0, "high": 1.0}),
    Member(losses.icepop),
    Member(losses.sequence_mask, {"cap": 1.1}, {"cap": 0.9}),
    Member(losses.sequence_mask, {"cap": 1.1, "weight": "token"}, {"cap": 0.9}),
    Member(losses.geometric_mask, {"low": 0.97, "high": 1.03}, {"low": 1.0, "high": 1.0}),
    Member(losses.kl_mask, {"threshold": 0.005}, {"threshold": 0.002}),
    Member(losses.kl_mask, {"threshold": 0.0, "estimator": "k1"}, {"threshold": -0.05}),
    Member(losses.kl_mask, {"threshold": 0.02, "reduce": "sum"}, {"threshold": 0.005}),
    Member(
        losses.kl_mask,
        {"threshold": 0.02, "estimator": "k2", "reduce": "max"},
        {"threshold": 0.005},
    ),
    Member(losses.binary_kl_mask, {"threshold": 0.01}, {"threshold": 0.001}),
    Member(losses.top_entropy, {}, {"share": 0.6}),
    Member(losses.top_entropy, {"share": 1}),
    Member(losses.m2po, {"budget": 0.002}, {"budget": 0.0005}),
    Member(losses.m2po, {"budget": 0.002, "everywhere": True}, {"budget": 0.0005}),
    Member(losses.opsm, {"delta": 0.05}, {"delta": 0.5}),
    Member(losses.opsm, {"delta": 0.0, "against": "old"}, {"delta": 0.2}),
    Member(
        losses.adaptive_entropy,
        {"target": 0.9, "start": 0.1},
        {"target": 0.1, "start": 0.2},
    ),
    Member(losses.normalised, {"factor": losses.icepop(0.9, 1.1)}),
    Member(losses.normalised, {"factor": drop_truncated()}),
    Member(losses.normalised, {"factor": 0.5 * losses.tis() * losses.top_entropy(0.5)}),
]

# Further rows for the table of terms.
TERM_OPTIONS = [
    Member(losses.kl, {"gradient": "k2"}),
    Member(losses.kl, {"estimator": "k1", "gradient": "k3"}),
    Member(losses.kl, {"limit": 0.1}, {"limit": 0.2}),
    Member(losses.kl, {"input_limit": 0.3}, {"input_limit": 0.1}),
    Member(losses.kl, {"limit": 10, "input_limit": 20, "gradient": "k2"}),
    Member(losses.kl, {"unbiased": True}),
    Member(losses.kl, {"unbiased": True, "limit": 0.1, "estimator": "k1"}, {"limit": 0.2}),
    Member(losses.value_loss, {"huber": 0.5}, {"huber": 0.1, "clip": 0.5}),
    Member(losses.value_loss, {"huber": 0.5, "clip": None}, {"huber": 0.1}),
]
