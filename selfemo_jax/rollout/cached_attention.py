"""Attention of one new token of each row to the prompt that its slot shares and to its own completion.

Shape letters: S slots, W rows of a slot, U = S W rows, P prompt columns, T completion columns, N query heads,
K key-value heads, R = N / K, H head size.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

_NEGATIVE = -1e30


def two_part_attention(
    q: Float[Array, "S W N H"],
    prompt: tuple[Float[Array, "S K P H"], Float[Array, "S K P H"]],
    cache: tuple[Float[Array, "U K T H"], Float[Array, "U K T H"]],
    prompt_mask: Bool[Array, "S P"],
    cache_mask: Bool[Array, "S W T"],
) -> Float[Array, "S W N H"]:
    """One softmax over a slot's prompt and the row's own completion; scores and softmax in float32.

    The prompt part is one matrix product per slot and key-value head, of all W * R queries of the slot.
    """
    slots, width, num_heads, head_dim = q.shape
    num_kv = prompt[0].shape[1]
    repeats = num_heads // num_kv
    own = q.reshape(slots * width, num_kv, repeats, head_dim) * jnp.asarray(head_dim**-0.5, q.dtype)

    def to_shared(x):
        x = x.reshape(slots, width, num_kv, repeats, -1).transpose(0, 2, 1, 3, 4)
        return x.reshape(slots, num_kv, width * repeats, -1)

    def to_own(x):
        x = x.reshape(slots, num_kv, width, repeats, -1).transpose(0, 2, 1, 3, 4)
        return x.reshape(slots * width, num_kv, repeats, -1)

    first = _scores(to_shared(own), prompt[0])
    first = jnp.where(prompt_mask[:, None, None, :], first, _NEGATIVE)
    second = _scores(own, cache[0])
    second = jnp.where(cache_mask.reshape(slots * width, 1, 1, -1), second, _NEGATIVE)
    highest = jnp.maximum(first.max(axis=-1, keepdims=True), to_shared(second.max(axis=-1, keepdims=True)))
    first, second = jnp.exp(first - highest), jnp.exp(second - to_own(highest))
    total = first.sum(axis=-1, keepdims=True) + to_shared(second.sum(axis=-1, keepdims=True))
    out = (_sum_of(first, prompt[1]) + to_shared(_sum_of(second, cache[1]))) / total
    return to_own(out).reshape(q.shape).astype(q.dtype)


def _scores(queries: Float[Array, "B K Q H"], keys: Float[Array, "B K P H"]) -> Float[Array, "B K Q P"]:
    """XLA:CPU copies the second factor of a product of rows with rows transposed: better the few queries than
    all keys, and the barrier keeps it from swapping the two again."""
    if jax.default_backend() == "cpu":
        by_key = jnp.einsum("bkph,bkqh->bkpq", keys, queries, preferred_element_type=jnp.float32)
        return lax.optimization_barrier(by_key).swapaxes(-1, -2)
    return jnp.einsum("bkqh,bkph->bkqp", queries, keys, preferred_element_type=jnp.float32)


def _sum_of(weights: Float[Array, "B K Q P"], values: Float[Array, "B K P H"]) -> Float[Array, "B K Q H"]:
    weights = weights.astype(values.dtype)
    return jnp.einsum("bkqp,bkph->bkqh", weights, values, preferred_element_type=jnp.float32)
