"""An sglang-jax engine. Pinned to 0.1.0rc0: weights and draws reach into its private parts.

What it would do on its own, and why not here (measured on 0.1.0rc0):

- Its seeded draw does not follow the distribution (total variation 0.2); another takes its place.
- With overlapping schedules the same seeds gave other tokens in some runs; switched off.
- Where a thread of it fails it signals its parent process, here the trainer; it is told that it is
  its own parent, dies alone, and the trainer reads why.
- Log-probs of long completions come several times over; the last ones are right.
"""

import math
import mmap
import os
import re
import signal
import sys
import tempfile

import numpy as np

from .channel import Array, Completions, Load, Sample


VERSION = "0.1.0rc0"


def start(load: Load, memory: mmap.mmap):
    """An engine of the policy's shapes; weights come with the first push."""
    _isolate(load.options)
    _check_version()
    facts = _check_memory(load)
    _draw_exactly()
    worker = _Worker(load, memory)
    return worker, facts


def engine_name(name: str) -> str:
    """What the engine calls the array that a Hugging Face checkpoint calls `name`.

    Its projections are `[in out]`, as eqrl's are; nothing else differs but the names.
    """
    if name.endswith(".bias"):
        return name
    if re.search(r"(norm)\.weight$", name):
        return name.removesuffix("weight") + "scale"
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        return name.removesuffix("weight") + "embedding"
    return name


def as_engine_array(x: np.ndarray, shape: tuple[int, ...], head_dim: int, name: str) -> np.ndarray:
    """`x` in the engine's shape: it repeats key and value heads that are fewer than its devices.

    Raises:
        ValueError: if the shapes do not belong together.
    """
    if x.shape == shape:
        return x
    times, rest = divmod(shape[-1], x.shape[-1])
    if x.shape[:-1] != shape[:-1] or rest or not re.search(r"\.[kv]_proj\.", name):
        raise ValueError(f"{name} is {x.shape} in the policy, and the engine wants {shape}")
    heads = x.reshape(*x.shape[:-1], -1, head_dim)
    return np.repeat(heads, times, axis=-2).reshape(shape)


def _isolate(options: dict) -> None:
    """Everything that has to happen before sgl_jax is imported."""
    os.dup2(2, 1)
    tempfile.tempdir = options["scratch"]  # it leaves socket files behind
    import psutil

    psutil.Process.parent = lambda self: psutil.Process()


def _check_version() -> None:
    import importlib.metadata

    found = importlib.metadata.version("sglang-jax")
    if found != VERSION:
        raise ValueError(f"sglang-jax {found} is installed in {sys.prefix}; install {VERSION}")


def _check_memory(load: Load) -> dict:
    """Weights and cache against what is free; the engine itself would be killed.

    Raises:
        ValueError: with the arithmetic.
    """
    import jax

    options, config = load.options, load.config
    device, shards = jax.devices()[0], options["tp_size"]
    if len(jax.devices()) < shards:
        raise ValueError(
            f"tp_size={shards}, but the engine sees {len(jax.devices())} of {device.platform}; "
            "lower it, or let environment= show it more"
        )
    free = _free_bytes(device)
    width = {"bfloat16": 2, "float32": 4}[options["dtype"]]
    head_dim = -(-config["head_dim"] // 128) * 128
    heads = max(config["num_key_value_heads"], shards)  # it repeats those that are too few
    a_token = 2 * config["num_hidden_layers"] * heads * head_dim * width
    cache = options["max_total_tokens"] * a_token
    weights = width * sum(math.prod(x["shape"]) for x in load.arrays)
    scores = _score_bytes(options, config["num_attention_heads"])
    need = (cache + weights + scores) / shards
    facts = {"device": str(device), "free_gib": free / 2**30, "need_gib": need / 2**30}
    if need > free:
        raise ValueError(
            f"{weights / 2**30:.2f} GiB of weights, {cache / 2**30:.2f} GiB of keys and values "
            f"(max_total_tokens={options['max_total_tokens']} of {a_token:,} bytes) and "
            f"{scores / 2**30:.2f} GiB of attention scores on {shards} devices with "
            f"{free / 2**30:.2f} GiB free each; lower context_length, max_running_requests or "
            "max_total_tokens, or raise tp_size"
        )
    return facts


def _score_bytes(options: dict, heads: int) -> int:
    """Its attention elsewhere than on TPUs has scores of a prefill with the whole cache, in three
    float32 copies (measured: 52.07e9 bytes for 4 heads, 4,096 tokens and a cache of 262,144)."""
    if options["device"] == "tpu":
        return 0
    return 3 * 4 * heads * _prefill(options) * options["max_total_tokens"]


def _prefill(options: dict) -> int:
    """Tokens of a prefill at most."""
    return max(options["context_length"], 1024)


def _free_bytes(device) -> int:
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    import psutil

    return psutil.virtual_memory().available


def _draw_exactly() -> None:
    """One categorical draw a row, with a key of the row's seed and the token's position."""
    import jax
    import jax.numpy as jnp
    from sgl_jax.srt.layers import sampler  # pyright: ignore[reportMissingImports]

    def draw(operands):
        weights, seeds, positions, rng, are_probs = operands
        logits = jnp.log(weights) if are_probs else weights
        if seeds is None:
            return jax.random.categorical(rng, logits).reshape(-1, 1)

        def one(seed, position, row):
            return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), position), row)

        return jax.vmap(one)(seeds, positions, logits)[:, None].astype(jnp.int32)

    sampler.multinomial_with_seed = draw


def _engine(options: dict):
    from sgl_jax.srt.entrypoints.engine import Engine  # pyright: ignore[reportMissingImports]

    context, rows = options["context_length"], options["max_running_requests"]
    prefill, fraction = _prefill(options), options["mem_fraction_static"]
    engine = Engine(
        model_path=options["scratch"],
        load_format="dummy",
        device=options["device"],
        dtype=options["dtype"],
        context_length=context,
        max_total_tokens=options["max_total_tokens"],
        max_running_requests=rows,
        max_prefill_tokens=prefill,
        chunked_prefill_size=-1,
        disable_radix_cache=True,
        disable_overlap_schedule=True,
        enable_deterministic_sampling=True,
        enable_single_process=True,
        skip_tokenizer_init=True,
        tp_size=options["tp_size"],
        precompile_bs_paddings=_sizes(rows),
        precompile_token_paddings=sorted({64, prefill}),
        **({} if fraction is None else {"mem_fraction_static": fraction}),
        # Elsewhere than on a TPU there is one attention, which wants pages of one token.
        **({} if options["device"] == "tpu" else {"attention_backend": "native", "page_size": 1}),
        **({"device_indexes": [0]} if options["tp_size"] == 1 else {}),
    )
    # The first request installs handlers that drain on SIGTERM and kill on SIGQUIT.
    engine.generate(input_ids=[[0]], sampling_params=[{"max_new_tokens": 1}], return_logprob=True)
    for number in (signal.SIGQUIT, signal.SIGTERM):
        engine.loop.remove_signal_handler(number)
    for number in (signal.SIGQUIT, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    return engine


def _sizes(rows: int) -> list[int]:
    """Batches that it compiles for: a decode step is padded to the next one."""
    return sorted({rows} | {2**i for i in range(3, math.ceil(math.log2(max(rows, 8))), 2)} - {0})


def _names(model) -> list[str]:
    """Of its arrays, in the order in which it keeps them."""
    from flax import nnx  # pyright: ignore[reportMissingImports]

    leaves = nnx.to_flat_state(nnx.split(model)[1])
    return [".".join(map(str, path)) for path, _ in leaves]


class _Worker:
    def __init__(self, load: Load, memory: mmap.mmap):
        self._arrays = [Array(**x) for x in load.arrays]
        self._memory, self._head_dim = memory, load.config["head_dim"]
        self._engine = _engine(load.options)
        worker = self._engine.scheduler_info["scheduler"].tp_worker
        self._runner = getattr(worker, "worker", worker).model_runner
        self._names = _names(self._runner.model)

    def push(self) -> None:
        import jax

        given = dict(self._given())
        leaves = self._runner.model_state_leaves
        for name, old in zip(self._names, leaves, strict=True):
            if name not in given:
                raise ValueError(f"the engine's {name} is not among the policy's arrays")
            given[name] = as_engine_array(given[name], old.shape, self._head_dim, name)
        if len(given) > len(leaves):
            extra = sorted(given.keys() - set(self._names))
            raise ValueError(f"the engine has no {extra[0]}, which the policy has")
        new = []
        for name, old in zip(self._names, leaves, strict=True):
            # A copy, for the shared memory changes while the engine samples.
            x = np.array(given.pop(name)).astype(old.dtype)
            where = old.sharding
            old.delete()  # there need not be room for both
            new.append(jax.device_put(x, where))
        jax.block_until_ready(new)
        self._runner.model_state_leaves = new
        self._engine.flush_cache()

    def _given(self):
        """The policy's arrays by the engine's names, as they lie in shared memory."""
        import ml_dtypes  # noqa: F401  # names bfloat16 for NumPy

        for array in self._arrays:
            whole = np.ndarray(array.shape, np.dtype(array.dtype), self._memory, array.offset)
            stacked = len(array.names) > 1 or array.names[0].startswith("model.layers.")
            for i, name in enumerate(array.names):
                yield engine_name(name), whole[i] if stacked else whole

    def sample(self, request: Sample) -> Completions:
        """A request a completion: its own seed, so that neighbours do not matter."""
        prompts = [
            tokens[positions >= 0].tolist()
            for tokens, positions in zip(request.tokens, request.positions, strict=True)
        ]
        answers = self._engine.generate(
            input_ids=[prompt for prompt in prompts for _ in range(request.samples)],
            sampling_params=[
                {
                    "max_new_tokens": request.max_tokens,
                    "temperature": request.temperature,
                    "stop_token_ids": request.stop_ids,
                    "sampling_seed": int(seed),
                    "top_p": 1.0,
                    "top_k": -1,
                    "min_p": 0.0,
                }
                for seed in request.seeds
            ],
            return_logprob=True,
        )
        shape = (len(answers), request.max_tokens)
        found = Completions(
            tokens=np.zeros(shape, np.int32),
            logprobs=np.zeros(shape, np.float32),
            lengths=np.zeros(shape[0], np.int32),
            stopped=np.zeros(shape[0], bool),
        )
        for row, answer in enumerate(answers):
            facts = answer["meta_info"]
            last = facts["output_token_logprobs"][-facts["completion_tokens"] :]
            ids = [entry[1] for entry in last]
            if ids != list(answer["output_ids"]):
                raise RuntimeError("the engine's ids and the ids of its log-probs differ")
            found.tokens[row, : len(ids)] = ids
            found.logprobs[row, : len(ids)] = [entry[0] for entry in last]
            found.lengths[row] = len(ids)
            found.stopped[row] = facts["finish_reason"]["type"] == "stop"
        return found
