"""Everything the command line of the examples can ask for, one dataclass a group.

`None` means "follow the model or the algorithm"; `config.resolve` fills it. Zero always means zero.
"""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg


# Short placeholders keep flag and help on one line.
Count = Annotated[int, arg(metavar="N")]
Number = Annotated[float, arg(metavar="X")]
Text = Annotated[str, arg(metavar="TEXT")]
CountOrNone = Annotated[int | None, arg(metavar="N")]
# Open until `resolve` fills it, so the default is told in the help instead of printed as `None`.
# Type checkers see Any: scripts read resolved configurations, which hold numbers.
if TYPE_CHECKING:
    OpenCount = OpenNumber = OpenText = OpenSplit = Any
else:
    OpenCount = Annotated[int | None, arg(metavar="N", help_behavior_hint="")]
    OpenNumber = Annotated[float | None, arg(metavar="X", help_behavior_hint="")]
    OpenText = Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")]
    OpenSplit = Annotated[str | None, arg(metavar="S", help_behavior_hint="")]

AlgorithmName = Literal[
    "reinforce", "ppo", "grpo", "rloo", "dapo", "reinforce++", "reinforce++-baseline", "dr_grpo",
    "cispo", "clip_cov", "dppo", "gdpo", "gmpo", "gpg", "gspo", "kl_cov", "lite_ppo", "luspo",
    "m2po", "max_rl", "opo", "pkpo", "remax", "sapo", "vapo", "vespo",
]  # fmt: skip


# What is learned from a batch.
@dataclasses.dataclass(frozen=True)
class Algo:
    name: AlgorithmName = "grpo"
    """advantage, objective, weighting and selection, as published"""
    advantage: OpenText = None
    """another advantage, e.g. "rloo() | whiten() | clip(5.0)\""""
    objective: OpenText = None
    """another objective, e.g. "tis(2.0) * clipped(0.2, 0.28)\""""
    weighting: OpenText = None
    """another reduction, e.g. "token_mean()\""""
    selection: OpenText = None
    """another selection, e.g. "drop_truncated()\""""
    target: OpenText = None
    """another value target, e.g. "gae(lam=1.0) | add_values()\""""
    old_logprobs: Annotated[Literal["trainer", "sampler"], arg(metavar="B")] = "trainer"
    """trainer or sampler: whose log-probs the ratio is against"""
    kl: OpenNumber = None
    """KL coefficient (default: the algorithm's own)"""
    epochs: OpenCount = None
    """times each rollout is trained on (default: ppo, vapo 2, else 1)"""
    minibatches: OpenCount = None
    """updates per epoch (default: ppo, vapo 4; new surrogates, gspo and on, 2; else 1)"""
    max_refills: OpenCount = None
    """dynamic sampling: extra rollouts per step at most (default: dapo 3)"""


# Which problems.
@dataclasses.dataclass(frozen=True)
class Data:
    path: Text = "demo"
    """demo (generated word problems), a folder of JSONL, or a hub id"""
    split: Text = "train"
    """problems to train on"""
    eval_split: OpenSplit = None
    """held-out problems (default: demo held_out, else test)"""
    limit: Count = 0
    """train on the first N problems only; 0 = all"""
    system_prompt: OpenText = None
    """default: the data set's own; "" = none"""
    max_prompt_tokens: Count = 512
    """longer prompts are left out and counted"""


# What is sampled in one step.
@dataclasses.dataclass(frozen=True)
class Rollout:
    prompts: OpenCount = None
    """prompts per step (default: demo 16, else 4)"""
    samples: OpenCount = None
    """completions per prompt (default: demo 8, else 4)"""
    max_tokens: OpenCount = None
    """new tokens per completion at most (default: demo 64, else 256)"""
    passes: Count = 1
    """calls of the sampler for a step's prompts; more need less memory"""
    temperature: Number = 1.0
    """of sampling, and of the log-probs that train"""
    backend: Annotated[str, arg(metavar="B")] = "naive"
    """naive, own-process, sglang-jax or openai(url='...')"""
    overlap: Count = 0
    """batches sampled ahead while training; 0 = strictly on-policy"""


# What a completion is worth.
@dataclasses.dataclass(frozen=True)
class Reward:
    weights: Annotated[tuple[float, ...], arg(metavar="X...")] = ()
    """one a reward function (default: those of the task; here 1 0.5 0)"""
    timeout: Number = 5.0
    """seconds one call may take; a late one costs that sample"""


# How parameters move.
@dataclasses.dataclass(frozen=True)
class Optim:
    name: Annotated[Literal["adamw", "lion", "sgd", "muon"], arg(metavar="NAME")] = "adamw"
    """adamw, lion, sgd or muon, of the policy; the critic's is adamw"""
    lr: OpenNumber = None
    """peak learning rate (default: demo 1e-4, else 1e-6)"""
    critic_lr: OpenNumber = None
    """the critic's peak rate (default: demo 5e-4, else 1e-5)"""
    schedule: Annotated[Literal["constant", "warmup_cosine"], arg(metavar="NAME")] = "constant"
    """constant or warmup_cosine, counted in updates"""
    warmup_ratio: OpenNumber = None
    """warm-up's share of all updates (default: 0.05)"""
    clip_norm: Number = 1.0
    """global gradient norm at most; 0 = off"""
    weight_decay: Number = 0.0
    """on matrices only"""
    micro_batch: Count = 0
    """sequences per backward pass, all devices; 0 = a whole minibatch"""
    micro_batch_per_device: Count = 0
    """the same for one device, whatever the mesh; 0 = follow micro-batch"""
    remat: bool = False
    """recompute layers in the backward pass, for less memory"""


# Held-out problems.
@dataclasses.dataclass(frozen=True)
class Eval:
    every: Count = 10
    """steps between light evaluations; 0 = only before and after"""
    prompts: Count = 64
    """problems of a light evaluation"""
    full: CountOrNone = 256
    """problems of the sweep before and after; 0 = all, None = no sweep"""
    samples: Count = 1
    """completions per problem: the k of pass@k"""
    temperature: Number = 0.0
    """0 = greedy"""


# What survives a crash.
@dataclasses.dataclass(frozen=True)
class Checkpoint:
    every: Count = 0
    """steps between checkpoints; 0 = only at the end"""
    keep: Count = 2
    """how many of the newest stay; 0 = all"""


# Where metrics go besides metrics.jsonl.
@dataclasses.dataclass(frozen=True)
class Track:
    wandb: Annotated[Literal["online", "offline", "disabled"], arg(metavar="MODE")] = "disabled"
    """online, offline or disabled; a missing key costs one warning"""
    project: Text = "eqrl"
    """W&B project, or project/run (default: the run folder's name)"""


# Several processes; TPU pods and Slurm need none of this.
@dataclasses.dataclass(frozen=True)
class Distributed:
    coordinator: OpenText = None
    """host:port of process 0 (default: TPU pods and Slurm are detected)"""
    num_processes: OpenCount = None
    """how many are started, each with the same arguments"""
    process_id: OpenCount = None
    """which one this is, from 0; 0 writes and prints"""
    timeout: Count = 60
    """seconds to wait for others; at the start twice that"""


@dataclasses.dataclass(frozen=True)
class Config:
    """Post-train a language model by reinforcement learning.
    --config run.yaml reads these names from YAML; the command line wins over it."""

    model: Text = "demo"
    """demo (embedded), smollm2 (PyPI), a folder, a GGUF file or a hub id"""
    steps: OpenCount = None
    """rollout batches (default: demo 40, else 100); 0 = only evaluate"""
    seed: Count = 0
    """same seed, same run"""
    run_dir: OpenText = None
    """folder of everything written (default: runs/<time>-<algorithm>)"""
    resume: Text = "auto"
    """auto (if the run folder has a checkpoint), never, or a run folder"""
    dtype: Annotated[Literal["float32", "bfloat16"], arg(metavar="TYPE")] = "float32"
    """float32 or bfloat16, of parameters and matrix products"""
    mesh: OpenText = None
    """auto, or axes as fsdp=-1 or data=2,fsdp=4/data=8: to train / to sample"""
    policy_loss_impl: Literal["reference", "chunked", "pallas", "jax", "auto"] = "auto"
    """log-prob kernel; jax = chunked; pallas: TPU and GPU"""
    plugins: Annotated[tuple[str, ...], arg(metavar="TEXT...")] = ()
    """modules or .py files whose functions the expressions may call"""
    print_config: bool = False
    """print everything resolved and derived, and stop"""
    plan: OpenText = None
    """only compile, and say what it takes: on v6e-8, h200-1, ...; --dry-run: here"""
    algo: Algo = Algo()
    data: Data = Data()
    rollout: Rollout = Rollout()
    reward: Reward = Reward()
    optim: Optim = Optim()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    track: Track = Track()
    distributed: Distributed = Distributed()
