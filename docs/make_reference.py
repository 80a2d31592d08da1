"""Writes the reference pages from the docstrings, and draws what each estimator does.

    python docs/make_reference.py            # pages and figures
    python docs/make_reference.py --check    # exit status 1 if a page is out of date

A page is an introduction (below), and for each member its call, its docstring and, for estimators,
a figure of one example batch: two groups of four completions, of which some have a gap (tool
output) and one is cut off. Rows are completions, columns tokens; grey is not the policy's.
"""

import inspect
import pathlib
import re
import sys
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

import eqrl
from eqrl import algorithms, presets


DOCS = pathlib.Path(__file__).resolve().parent
IMAGES = DOCS / "images" / "estimators"

ESTIMATORS = {
    "Baselines: what a completion is compared with": [
        "group_center", "rloo", "group_norm", "batch_center", "batch_norm", "ema_baseline", "opo",
        "gpg", "max_rl", "pass_at_k", "remax",
    ],
    "Several reward components": ["component", "gdpo"],
    "Credit along a completion": [
        "returns", "gae", "gae_adaptive", "add_values", "turn_returns", "turn_gae",
        "optimal_token_baseline",
    ],
    "Shaping: what else a token costs": [
        "kl_penalty", "adaptive_kl_penalty", "kl_shaping", "overlong", "length_cost",
        "length_reward",
    ],
    "Scale and place": ["whiten", "clip", "scale", "shift", "as_score"],
}  # fmt: skip
OBJECTIVES = {
    "Surrogates": [
        "reinforce", "unclipped", "clipped", "cispo", "cispo_around_one", "sapo", "gmpo", "dppo",
        "vespo", "clip_cov", "kl_cov", "dro", "positive_nll",
    ],
    "Ratios: what a surrogate looks at": [
        "token_ratio", "sequence_ratio", "geometric_ratio", "geometric_token_ratio",
    ],
    "Regularisers and the critic": ["kl", "squared_ratio", "entropy_bonus", "value_loss"],
    "Factors: corrections for what the sampler computed": [
        "tis", "tis_sequence", "clamp_weights", "icepop", "sequence_mask", "geometric_mask",
        "kl_mask", "binary_kl_mask", "m2po", "opsm", "normalised",
    ],
    "Factors: which tokens, and how much": ["top_entropy", "adaptive_entropy"],
}  # fmt: skip
REDUCTIONS = {
    "Weightings": [
        "token_mean", "sequence_mean", "sequence_sum", "constant_length", "token_sum",
    ],
    "Selections": [
        "drop_constant_groups", "drop_extreme_groups", "drop_truncated", "drop_unstopped",
        "drop_stale",
    ],
}  # fmt: skip

INTRODUCTIONS = {
    "estimators": """# Estimators: from reward to advantage

An estimator maps a per-token signal to a per-token signal, with the rollout as context. The reward
goes in at the left of a chain and the advantage comes out at its right:

```python
import eqrl
from eqrl import clip, group_norm, kl_penalty, returns, rloo, whiten

advantage = rloo() | whiten() | clip(5.0)
advantage = kl_penalty(0.01) | returns() | whiten()
assert eqrl.parse("kl_penalty(0.01) | returns() | whiten()") == advantage
```

`a | b` chains, `a + b` adds two readings of one signal, `0.2 * a` scales. Order matters: a KL
penalty before a baseline is seen by it, after it each token bears its own. A chain that would read
a completion's total after the signal was repeated over tokens is refused when it is built;
`as_score()` is the way back.

**Who counts.** A row without a masked token (padding, or dropped by the algorithm's selection)
enters no mean, no deviation and no denominator, and gets 0. In `a & b`, b judges what a has kept:
put a rule on whole groups last. A selection that stands as a factor of a loss term acts after the
statistics, and changes none of them. A completion whose group has no other live row has nothing to
be compared with: where the ids are known it is refused, under `jit` it gets 0. Equal scores give
exactly 0, in any precision.

Each figure shows one batch of two groups of four completions, their rewards at the left.
""",
    "objectives": """# Objectives: terms, ratios, factors

A term maps `(scores, batch)` to a value per token, to be minimised. Terms add, numbers scale them,
and *factors* weigh them token by token without a gradient of their own:

```python
from eqrl import clipped, entropy_bonus, geometric_ratio, kl, tis

objective = tis(2.0) * clipped(0.2, 0.28) + 0.04 * kl() + 0.001 * entropy_bonus()
objective = clipped(3e-4, 4e-4, ratio=geometric_ratio())  # GSPO's
```

What a term or factor has to know of *all* tokens (a quantile, a covariance, a coefficient that
adapts) it computes once per rollout, in `algorithm.assign`. So no micro-batch, and no mesh, changes
a gradient.

The importance weight between trainer and sampler is
$w_t = e^{\\log\\pi_{old}(t) - \\log\\pi_{roll}(t)}$. With `rollout.old_logprobs` absent (one update
per rollout), the current log-probs stand in. Setting `old_logprobs` to the sampler's `logprobs`
("bypass"; `--algo.old-logprobs sampler`) makes the ratio itself bear the mismatch: a clip or `dppo`
then holds back the drift from the policy that really sampled.

A factor that masks leaves the denominator alone, so masking half of the tokens halves the step;
`normalised(f)` divides by what is kept.
""",
    "reductions": """# Reductions: weightings and selections

The loss is `sum(weights * value)`. A weighting computes the weights from the mask of all rows of
one optimizer step, so any split into micro-batches sums to the same gradient. A selection says
which completions train.

```python
from eqrl import Algorithm, clipped, drop_truncated, group_norm, normalised, sequence_mean

# Before every statistic: dropped rows count nowhere.
before = Algorithm(group_norm(), clipped(), sequence_mean(), selection=drop_truncated())
# After every statistic: dropped rows count in the group's mean and in the denominator.
after = Algorithm(group_norm(), drop_truncated() * clipped(), sequence_mean())
# After the statistics, with the full step on the rows that are left.
kept = Algorithm(group_norm(), normalised(drop_truncated()) * clipped(), sequence_mean())
```

`normalised(drop_constant_groups()) * clipped()` divides a token mean by the tokens of groups that
carry a signal, and leaves other terms, such as a KL, on all tokens.
""",
    "algorithms-reference": """# Named algorithms and presets

`eqrl.algorithms` follows the papers, `eqrl.presets` the libraries. Each is an `Algorithm` made of
the pieces on the other pages; print one to see them:

```python
from eqrl import algorithms, presets

print(algorithms.grpo())
print(presets.trl.grpo())
```
""",
}


def example() -> tuple[jnp.ndarray, eqrl.Rollout, np.ndarray]:
    """The batch of the figures: signal, rollout and raw rewards."""
    rng = np.random.default_rng(4)
    rows, time = 8, 14
    length = np.array([6, 9, 12, 14, 5, 8, 11, 14])
    mask = np.arange(time)[None] < length[:, None]
    mask[[2, 6], 5:7] = False  # tool output
    correct = np.array([1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    brief = np.array([1.0, 0.5, 0.5, 0.0, 1.0, 0.5, 0.5, 0.0])
    smooth = np.cumsum(rng.normal(0, 0.15, (rows, time)), axis=1)
    logprobs = -np.abs(rng.normal(0.6, 0.5, (rows, time)))
    rollout = eqrl.Rollout(
        tokens=jnp.zeros((rows, time), jnp.int32),
        mask=jnp.asarray(mask),
        positions=jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), (rows, time)),
        logprobs=jnp.asarray(logprobs, jnp.float32),
        group=jnp.asarray([0] * 4 + [4] * 4, jnp.int32),
        truncated=jnp.asarray(length == time),
        rewards=jnp.asarray(np.stack([correct, brief], axis=1), jnp.float32),
        ref_logprobs=jnp.asarray(logprobs - rng.normal(0.1, 0.4, (rows, time)), jnp.float32),
        values=jnp.asarray(0.4 + smooth, jnp.float32),
        sum_pi_squared=jnp.asarray(np.exp(2 * logprobs) * 0.9, jnp.float32),
        greedy_rewards=jnp.asarray([1.0] * 4 + [0.0] * 4, jnp.float32),
    )
    return eqrl.outcome(jnp.asarray(correct, jnp.float32), rollout.mask), rollout, correct


SHOWN = {
    "pass_at_k": "pass_at_k(2)", "component": "component(1)", "gdpo": "gdpo(1.0, 0.5)",
    "kl_penalty": "kl_penalty(0.1)", "kl_shaping": "kl_shaping(0.1)",
    "adaptive_kl_penalty": "adaptive_kl_penalty(0.1)", "overlong": "overlong(14, 6)",
    "length_cost": "length_cost(0.5)", "length_reward": "length_reward(0.5)",
    "clip": "rloo() | clip(0.5)", "scale": "scale(2.0)", "shift": "shift(-0.5)",
    "add_values": "gae() | add_values()", "gae_adaptive": "gae_adaptive(alpha=0.5)",
    "returns": "kl_penalty(0.1) | returns(0.95)", "whiten": "rloo() | whiten()",
    "as_score": "rloo() | as_score()", "turn_returns": "kl_penalty(0.1) | turn_returns()",
}  # fmt: skip


def draw(name: str) -> None:
    """One picture: the advantages that `name` gives the example batch."""
    import matplotlib.pyplot as plt

    signal, rollout, reward = example()
    text = SHOWN.get(name, f"{name}()")
    piece = eqrl.parse(text)
    assert isinstance(piece, eqrl.AbstractTransform)
    state = piece.init()
    if name == "ema_baseline":  # the first batch has nothing to be compared with
        _, state = piece.update(signal, state, rollout)
    out, _ = piece.update(signal, state, rollout)
    out, mask = np.asarray(out), np.asarray(rollout.mask)
    figure, axes = plt.subplots(figsize=(5.2, 2.6), layout="constrained")
    limit = max(1e-6, float(np.abs(out[mask]).max()))
    picture = axes.imshow(
        np.where(mask, out, np.nan), cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto"
    )
    axes.set_facecolor("0.85")
    axes.set_yticks(range(8), [f"reward {r:g}" for r in reward], fontsize=7)
    axes.axhline(3.5, color="black", linewidth=1)
    axes.set_xlabel("token", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_title(text, fontsize=9, family="monospace")
    figure.colorbar(picture).ax.tick_params(labelsize=7)
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / f"{name}.png", dpi=90, metadata={"Software": None})
    plt.close(figure)


def signature(function: Callable) -> str:
    """The call with its defaults, without annotations."""
    found = inspect.signature(function)
    bare = [p.replace(annotation=p.empty) for p in found.parameters.values()]
    return f"{function.__name__}{found.replace(parameters=bare, return_annotation=found.empty)}"


def body(function: Callable) -> str:
    """The docstring as Markdown."""
    text = inspect.getdoc(function) or ""
    text = re.sub(r"^(Args|Returns|Raises|Attributes):$", r"**\1**\n", text, flags=re.MULTILINE)
    lines = []
    for line in text.splitlines():
        argument = re.match(r"^    (\*?\w+): (.*)$", line)
        if argument:
            lines.append(f"- `{argument[1]}`: {argument[2]}")
        else:
            lines.append(re.sub(r"^    (    )?", "  " if line.startswith("        ") else "", line))
    return "\n".join(lines)


def member(function: Callable, name: str, level: str = "###") -> str:
    image = IMAGES / f"{name}.png"
    picture = f"\n![{name}](images/estimators/{name}.png)\n" if image.exists() else ""
    return f"{level} `{name}`\n\n```\n{signature(function)}\n```\n{picture}\n{body(function)}\n"


def page(title: str, families: dict[str, list[str]]) -> str:
    parts = [INTRODUCTIONS[title]]
    for family, names in families.items():
        parts.append(f"## {family}\n")
        parts += [member(getattr(eqrl, name), name) for name in names]
    return "\n".join(parts)


def algorithm_page() -> str:
    parts = [INTRODUCTIONS["algorithms-reference"]]
    homes = [("eqrl.algorithms", algorithms)]
    for name in ("trl", "verl", "openrlhf", "tunix", "predecessor"):
        homes.append((f"eqrl.presets.{name}", getattr(presets, name)))
    for title, module in homes:
        parts.append(f"## {title}\n\n{inspect.getdoc(module)}\n")
        for name, function in sorted(vars(module).items()):
            ours = getattr(function, "__module__", "").startswith(module.__name__)
            if inspect.isfunction(function) and ours and not name.startswith("_"):
                parts.append(member(function, name))
    return "\n".join(parts)


def pages() -> dict[str, str]:
    """Every generated page by file name."""
    made = {
        "estimators.md": page("estimators", ESTIMATORS),
        "objectives.md": page("objectives", OBJECTIVES),
        "reductions.md": page("reductions", REDUCTIONS),
        "algorithms-reference.md": algorithm_page(),
    }
    note = "<!-- Written by docs/make_reference.py from the docstrings; edit those. -->\n\n"
    return {name: note + text.rstrip() + "\n" for name, text in made.items()}


def main() -> int:
    if "--check" not in sys.argv[1:]:
        for names in ESTIMATORS.values():
            for name in names:
                draw(name)
    stale = []
    for name, text in pages().items():
        path = DOCS / name
        if not path.exists() or path.read_text() != text:
            stale.append(name)
            if "--check" not in sys.argv[1:]:
                path.write_text(text)
    if "--check" in sys.argv[1:] and stale:
        print(f"out of date: {', '.join(stale)}; run python docs/make_reference.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
