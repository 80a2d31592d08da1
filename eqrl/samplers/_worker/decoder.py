"""eqrl's own decoder in a process of its own."""

import mmap

import numpy as np

from .channel import Array, Completions, Load, Sample


def start(load: Load, memory: mmap.mmap):
    """Shapes of the policy; weights come with the first push."""
    import jax

    for name, value in load.options["settings"].items():
        jax.config.update(name, value)
    worker = _Worker(load, memory)
    return worker, {"device": str(jax.devices()[0]), "jax": jax.__version__}


class _Worker:
    def __init__(self, load: Load, memory: mmap.mmap):
        import eqrl

        models = eqrl.models
        self._shapes = models.abstract(models.Architecture.from_config(load.config))
        self._arrays = [Array(**x) for x in load.arrays]
        self._memory = memory
        self._policy = None

    def push(self) -> None:
        import jax
        import jax.numpy as jnp

        self._policy = None  # before the next one, for there need not be room for both
        leaves = [
            # A copy: the memory changes while a rollout that was asked for earlier runs.
            jnp.array(np.ndarray(x.shape, np.dtype(x.dtype), self._memory, x.offset))
            for x in self._arrays
        ]
        jax.block_until_ready(leaves)
        self._policy = jax.tree.unflatten(jax.tree.structure(self._shapes), leaves)

    def sample(self, request: Sample) -> Completions:
        import jax
        import jax.numpy as jnp

        import eqrl

        assert self._policy is not None, "weights are pushed first"
        sampling = eqrl.samplers.Sampling(
            request.samples, request.max_tokens, tuple(request.stop_ids), request.temperature
        )
        prompts = eqrl.Prompts(
            *(jnp.array(x) for x in (request.tokens, request.positions, request.ids))
        )
        key = jax.random.wrap_key_data(jnp.array(request.key), impl=request.key_type)
        rollout = eqrl.samplers.Decoder()(self._policy, prompts, sampling, key=key)
        slots = slice(prompts.tokens.shape[1], None)
        return Completions(
            tokens=np.asarray(rollout.tokens)[:, slots],
            logprobs=np.asarray(rollout.logprobs)[:, slots],
            lengths=np.asarray(rollout.mask).sum(axis=1).astype(np.int32),
            stopped=~np.asarray(rollout.truncated),
        )
