"""The rows of the contract table for transforms: `test_contract.py` says what each must keep."""

from collections.abc import Callable
from typing import Any, NamedTuple

from eqrl import _advantages as signals


class Member(NamedTuple):
    builder: Callable
    arguments: dict[str, Any] = {}
    vary: dict[str, Any] = {}  # numeric hyperparameters with a second legal value
    constant_is_zero: bool = False  # equal scores give exactly 0
    positional: tuple[Any, ...] = ()  # what a builder with `*arguments` gets

    def build(self, **others):
        return self.builder(*self.positional, **(self.arguments | others))

    def __repr__(self):
        return repr(self.build())


TRANSFORMS = [
    Member(signals.group_norm, {}, {"eps": 0.1}, True),
    Member(signals.group_norm, {"ddof": 0, "eps": 0}, {"ddof": 1}, True),
    Member(signals.group_norm, {"deviation": "batch"}, {"eps": 0.1, "ddof": 0}, True),
    Member(signals.group_norm, {"deviation": "others"}, {"eps": 0.1}, True),
    Member(signals.group_norm, {"deviation": "others", "ddof": 0, "eps": 0}, {"ddof": 1}, True),
    Member(signals.group_center, constant_is_zero=True),
    Member(signals.rloo, constant_is_zero=True),
    Member(signals.opo, constant_is_zero=True),
    Member(signals.gpg, {}, {"f_norm": 2.0}, True),
    Member(signals.max_rl, constant_is_zero=True),
    Member(signals.pass_at_k, {"k": 2}, {"k": 3}, True),
    Member(signals.pass_at_k, {"k": 3, "eps": 1e-6}, {"k": 2, "eps": 0.1}, True),
    Member(signals.remax),
    Member(signals.component, {"index": 1}),
    Member(signals.gdpo, {}, {"eps": 0.1}, True),
    Member(signals.gdpo, {"ddof": 0, "eps": 0}, {"ddof": 1}, True, positional=(2.0, -0.5)),
    Member(signals.batch_norm, {}, {"eps": 0.1}, True),
    Member(signals.batch_norm, {"ddof": 0, "eps": 0}, {"ddof": 1}, True),
    Member(signals.batch_center, constant_is_zero=True),
    Member(signals.whiten, {}, {"eps": 0.1}),
    Member(signals.whiten, {"ddof": 0, "eps": 0}, {"ddof": 1}),
    Member(signals.whiten, {"stabiliser": "outside"}, {"eps": 0.1}),
    Member(signals.whiten, {"stabiliser": "clamp"}, {"eps": 9.0}),
    Member(signals.returns, {}, {"gamma": 0.9}),
    Member(signals.returns, {"gamma": 0.0}),
    Member(signals.gae, {}, {"gamma": 0.9, "lam": 0.5}),
    Member(signals.gae, {"gamma": 0, "lam": 0}),
    Member(signals.add_values),
    Member(signals.as_score),
    Member(signals.kl_penalty, {"coef": 0.1}, {"coef": 0.2}),
    Member(signals.kl_penalty, {"coef": 0.1, "estimator": "k2"}, {"coef": 0.2}),
    Member(signals.kl_penalty, {"coef": 0.1, "estimator": "k3"}, {"coef": 0.2}),
    Member(
        signals.overlong,
        {"max_tokens": 6, "buffer": 4},
        {"max_tokens": 5, "buffer": 2, "penalty": 3.0},
    ),
    Member(signals.overlong, {"max_tokens": 3, "buffer": 2, "capped": False}, {"max_tokens": 4}),
    Member(signals.clip, {"limit": 0.5}, {"limit": 1.0}),
    Member(signals.clip, {"limit": 0.5, "low": -0.1}, {"limit": 1.0, "low": -0.2}),
    Member(signals.scale, {"factor": -2.0}, {"factor": 0.5}),
    Member(signals.shift, {"offset": -2.0}, {"offset": 0.5}),
    Member(signals.ema_baseline, {}, {"decay": 0.5}),
    Member(signals.ema_baseline, {"debias": False}, {"decay": 0.5}),
    Member(signals.returns, {"gap": "decay"}, {"gamma": 0.9}),
    Member(signals.gae, {"gap": "decay"}, {"gamma": 0.9, "lam": 0.5}),
    Member(signals.gae_adaptive, {"alpha": 0.5}, {"gamma": 0.9, "alpha": 2.0}),
    Member(signals.turn_returns, {}, {"gamma": 0.9}),
    Member(signals.turn_gae, {}, {"gamma": 0.9, "lam": 0.5}),
    Member(signals.kl_penalty, {"coef": 0.1, "limit": 0.5}, {"limit": 0.2}),
    Member(signals.adaptive_kl_penalty),
    Member(signals.adaptive_kl_penalty, {"coef": 0.1, "horizon": 20, "estimator": "k3"}),
    Member(signals.kl_shaping, {"coef": 0.1}, {"coef": 0.2}),
    Member(signals.optimal_token_baseline, {}, {"cap": 1.0}),
    Member(signals.optimal_token_baseline, {"cap": None}),
    Member(signals.length_cost, {"coef": 0.1}, {"coef": 0.2, "threshold": -1.0}),
    Member(signals.length_reward, {"coef": 0.1}, {"coef": 0.2, "threshold": -1.0}),
]
