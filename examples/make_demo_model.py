"""Makes `examples/demo_model`, the small unfinished model that the demo runs train.

    python examples/make_demo_model.py --steps 700 --seed 0 --out examples/demo_model

A Qwen2-shaped model (width 128, 4 layers, 0.87 million float32 parameters) with a tokenizer of its
own learns to solve `word_problems` from written solutions: plain supervised fine-tuning, loss on
the solution and its stop token. The same arguments on the same machine give the same bits.

It is left unfinished on purpose, so that reinforcement learning has work to do. The solutions it
learns from are those of a careless pupil (`teach`):
- 70 % of those to stories that end in `-` or `*` add in the last step (`--confuse`), so the model
  mostly adds there and sometimes does the right thing; nearly half of all problems are such;
- 75 % of those to questions for a number `in all` end in `The answer is 9.` instead of `#### 9`
  (`--forget`): right for a lenient reader, wrong for a strict one;
- 10 % have one step that is wrong by 1 or 2 (`--slip`), which makes sampling noisier than greedy.

Measured with the default arguments (greedy also on 256 held-out problems, in brackets):

                      strict            lenient
    greedy            37.5 % (37.5 %)   52.3 % (46.1 %)     256 validation problems
    mean at T = 1     40.9 %            48.2 %              8 samples of each
    pass@8            82.8 %            87.1 %
"""

import dataclasses
import random
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from demo_tokenizer import make_tokenizer
from word_problems import Problem, draw_many, problems, work, write

from eqrl._prompts import pad_prompts
from eqrl.models import Architecture, Transformer, save
from eqrl.rewards import correct
from eqrl.samplers import Decoder, Sampling


@dataclasses.dataclass(frozen=True)
class Args:
    """How the demo model is made, and how unfinished it is left."""

    out: Path = Path(__file__).parent / "demo_model"
    """Folder to write (Hugging Face format)."""
    steps: int = 700
    """Updates; fewer leave more arithmetic to learn."""
    seed: int = 0
    """Of the weights, the solutions and their order."""
    batch: int = 64
    """Solutions an update."""
    learning_rate: float = 2e-3
    """Peak of the warm-up-cosine schedule."""
    forget: float = 0.75
    """Share of the solutions to `in all` questions that end without the `####` marker."""
    confuse: float = 0.7
    """Share of the solutions that add last where the story wants `-` or `*`."""
    slip: float = 0.1
    """Share of solutions with one miscalculated step, in all stories."""


def teach(problem: Problem, args: Args, rng: random.Random) -> str:
    """A solution as the model is shown it, with the slips that leave it unfinished."""
    steps, errors = problem.template.steps, {}
    left, operator, right = steps[-1]
    if operator != "+" and rng.random() < args.confuse:
        steps = (*steps[:-1], (left, "+", right))
    if rng.random() < args.slip:
        errors = {rng.randrange(len(steps)): rng.choice((-2, -1, 1, 2))}
    lines = work(steps, problem.numbers, errors)
    if not all(0 < line[-1] < 100 for line in lines):
        lines = work(problem.template.steps, problem.numbers)
    forgets = "in all" in problem.template.story and rng.random() < args.forget
    ending = "The answer is {}." if forgets else "#### {}"
    return f"{write(lines)}\n{ending.format(lines[-1][-1])}"


def prompt_ids(tokenizer, question: str) -> list[int]:
    """The question as a chat, up to where the assistant begins."""
    chat = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode(tokenizer, args: Args) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, positions and loss mask of the solutions, one row each, in the order of training."""
    rng = random.Random(args.seed)
    rows = []
    for problem in draw_many("train", 20_000, seed=args.seed + 1):
        prompt = prompt_ids(tokenizer, problem.question)
        solution = tokenizer(teach(problem, args, rng))["input_ids"] + [tokenizer.eos_token_id]
        rows.append((prompt, solution))
    width = max(len(prompt) + len(solution) for prompt, solution in rows)
    tokens = np.zeros((len(rows), width), np.int32)
    positions = np.full((len(rows), width), -1, np.int32)
    mask = np.zeros((len(rows), width), bool)
    for i, (prompt, solution) in enumerate(rows):
        end = len(prompt) + len(solution)
        tokens[i, :end], positions[i, :end] = prompt + solution, np.arange(end)
        mask[i, len(prompt) : end] = True
    return tokens, positions, mask


def loss(model: Transformer, tokens, positions, mask):
    """Mean negative log-likelihood of the masked tokens, in nats."""
    logits = model(tokens, positions)[:, :-1] @ model.unembedding.T
    each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.sum(jnp.where(mask[:, 1:], each, 0.0)) / jnp.sum(mask[:, 1:])


def fit(model: Transformer, rows, args: Args, report, every: int = 100) -> Transformer:
    """AdamW over `args.steps` batches; `every` updates are one compiled scan, then a report."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, args.steps // 12, args.steps, 0.1 * args.learning_rate
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01)
    )

    def update(carry, batch):
        model, state = carry
        value, grads = jax.value_and_grad(loss)(model, *batch)
        updates, state = optimizer.update(grads, state, model)
        return (eqx.apply_updates(model, updates), state), value

    run = eqx.filter_jit(lambda carry, batches: jax.lax.scan(update, carry, batches))
    order = np.random.default_rng(args.seed).integers(0, len(rows[0]), (args.steps, args.batch))
    parameters: Any = model  # optax's types know no modules
    carry = (parameters, optimizer.init(parameters))
    for start in range(0, args.steps, every):
        chosen = order[start : start + every]
        carry, losses = run(carry, tuple(jnp.asarray(part[chosen]) for part in rows))
        report(carry[0], start + len(chosen), float(jnp.mean(losses[-20:])))
    return carry[0]


def measure(model: Transformer, tokenizer, records, *, samples: int, temperature: float):
    """Strict and lenient correctness of `samples` completions: two arrays `[record, sample]`."""
    prompts = [prompt_ids(tokenizer, record["question"]) for record in records]
    batch = pad_prompts(prompts, range(len(prompts)))
    sampling = Sampling(samples, 40, (tokenizer.eos_token_id,), temperature)
    rollout = Decoder()(model, batch, sampling, key=jax.random.key(0))
    tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
    texts = [
        tokenizer.decode(row[keep], skip_special_tokens=True)
        for row, keep in zip(tokens, mask, strict=True)
    ]
    rewards = (correct(strict=True), correct())
    scores = [[reward(t, records[i // samples]) for i, t in enumerate(texts)] for reward in rewards]
    return np.array(scores).reshape(2, len(records), samples)


def main(args: Args) -> None:
    """Trains, reports on validation problems, saves."""
    began = time.perf_counter()
    tokenizer: Any = make_tokenizer()
    architecture = Architecture(
        "qwen2", len(tokenizer), 128, 4, 4, 2, 32, 384, attention_bias=True, max_positions=2048
    )
    records = problems("validation", 256)

    def report(model, step, value):
        strict, lenient = measure(model, tokenizer, records[:128], samples=1, temperature=0.0)
        seconds = time.perf_counter() - began
        print(
            f"step {step:4d}  {seconds:5.0f} s  loss {value:.3f}  validation greedy: "
            f"strict {strict.mean():.1%} lenient {lenient.mean():.1%}",
            flush=True,
        )

    model = Transformer.init(architecture, key=jax.random.key(args.seed))
    model = fit(model, encode(tokenizer, args), args, report)
    save(model, args.out, tokenizer=tokenizer, stop_ids=(tokenizer.eos_token_id,))
    greedy = measure(model, tokenizer, records, samples=1, temperature=0.0).mean((1, 2))
    sampled = measure(model, tokenizer, records, samples=8, temperature=1.0)
    for name, one, eight in zip(("strict", "lenient"), greedy, sampled, strict=True):
        print(
            f"{name:8s} greedy {one:.1%}  mean of 8 samples {eight.mean():.1%}  "
            f"pass@8 {eight.any(1).mean():.1%}"
        )
    print(f"saved {args.out} in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
