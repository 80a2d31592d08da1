"""Matrix products whose forward *and* backward run on half-width operands."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def accumulator(dtype: DTypeLike) -> DTypeLike:
    """The type that sums of products of `dtype` are kept in: at least float32."""
    return jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32


def contract(
    spec: str, left: Float[Array, "*left"], right: Float[Array, "*right"]
) -> Float[Array, "*out"]:
    """`jnp.einsum(spec, left, right)` of two equal types, summed and returned in float32.

    JAX's own transpose of a product with a float32 result multiplies the float32 cotangent with
    the bfloat16 operand, which every backend does by widening the operand: on GPUs and on CPUs
    with AMX that is several times slower. Here the cotangent is narrowed instead, as it would be
    had the product returned bfloat16.

    Args:
        spec: an explicit einsum of two operands; every index of an operand must also stand in
            the other one or in the result.
        left: first operand.
        right: second operand, of the same dtype.

    Returns:
        The product, in float32 (float64 for float64 operands).
    """
    return _product(spec, left, right)  # pyright: ignore[reportReturnType]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(spec, left, right):
    return jnp.einsum(spec, left, right, preferred_element_type=accumulator(left.dtype))


def _forward(spec, left, right):
    return _product(spec, left, right), (left, right)


def _backward(spec, saved, cotangent):
    left, right = saved
    inputs, out = spec.split("->")
    first, second = inputs.split(",")
    cotangent = cotangent.astype(left.dtype)
    grad_left = contract(f"{out},{second}->{first}", cotangent, right)
    grad_right = contract(f"{first},{out}->{second}", left, cotangent)
    return grad_left.astype(left.dtype), grad_right.astype(right.dtype)


_product.defvjp(_forward, _backward)
