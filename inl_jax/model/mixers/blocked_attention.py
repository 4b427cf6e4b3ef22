"""Causal softmax attention in blocks of queries, and its gradient.

    o_i = sum_(j <= i) p_ij v_j,   p_ij = exp(q_i k_j / sqrt(K) - l_i),   l_i = logsumexp_j

A block of queries meets the keys up to its own end alone, so that half of the products and of the
softmax is never computed. The backward pass keeps `l` and computes `p` again (Dao et al., 2022):

    dv_j = sum_i p_ij do_i,   ds_ij = p_ij (do_i v_j - do_i o_i),   dq_i = sum_j ds_ij k_j / sqrt(K)

Shapes: B batch, G key-value heads, R query heads of each, S tokens, K head width, Q queries of a
block, N keys up to its end.
"""

import jax
import jax.numpy as jnp

from inl_jax.model.layers import at_least_float32, kept

BLOCKS = 4  # at most, each written out: the program grows with them
SMALLEST = 64  # queries in a block: products of fewer rows are slower


@jax.custom_vjp
def blocked_attention(q_BGRSK, k_BGSK, v_BGSK) -> jax.Array:
    """Attention of every token to itself and to those before it, [B, G, R, S, K].

    Products are computed in the type of the arguments, the softmax at least in float32.
    """
    return _forward(q_BGRSK, k_BGSK, v_BGSK)[0]


def _blocks(num_tokens: int) -> list[slice]:
    """The positions of each block."""
    size = max(SMALLEST, -(-num_tokens // BLOCKS))
    return [slice(i, min(i + size, num_tokens)) for i in range(0, num_tokens, size)]


def _scores(q_BGRQK, k_BGNK):
    """`q k / sqrt(K)`; minus infinity for keys behind the query, of which N - 1 is the last."""
    (Q, K), N = q_BGRQK.shape[-2:], k_BGNK.shape[-2]
    wide = at_least_float32(q_BGRQK)
    s_BGRQN = jnp.einsum("bgrqk,bgnk->bgrqn", q_BGRQK, k_BGNK, preferred_element_type=wide)
    seen_QN = jnp.arange(N) <= jnp.arange(N - Q, N)[:, None]
    return jnp.where(seen_QN, s_BGRQN * K**-0.5, -jnp.inf)


def _forward(q_BGRSK, k_BGSK, v_BGSK):
    outs, logsums = [], []
    for block in _blocks(q_BGRSK.shape[-2]):
        q_BGRQK, (k_BGNK, v_BGNK) = q_BGRSK[..., block, :], _up_to(block, k_BGSK, v_BGSK)
        s_BGRQN = _scores(q_BGRQK, k_BGNK)
        top_BGRQ1 = s_BGRQN.max(axis=-1, keepdims=True)
        p_BGRQN = jnp.exp(s_BGRQN - top_BGRQ1)
        sum_BGRQ1 = p_BGRQN.sum(axis=-1, keepdims=True)
        o_BGRQK = jnp.einsum(
            "bgrqn,bgnk->bgrqk",
            p_BGRQN.astype(v_BGNK.dtype),
            v_BGNK,
            preferred_element_type=s_BGRQN.dtype,
        )
        outs.append((o_BGRQK / sum_BGRQ1).astype(q_BGRQK.dtype))
        logsums.append(top_BGRQ1 + jnp.log(sum_BGRQ1))
    o_BGRSK, l_BGRS1 = kept([jnp.concatenate(parts, axis=-2) for parts in (outs, logsums)])
    return o_BGRSK, (q_BGRSK, k_BGSK, v_BGSK, o_BGRSK, l_BGRS1)


def _backward(residuals, do_BGRSK):
    q_BGRSK, k_BGSK, v_BGSK, o_BGRSK, l_BGRS1 = residuals
    dtype, wide, S = q_BGRSK.dtype, l_BGRS1.dtype, q_BGRSK.shape[-2]
    inner_BGRS1 = jnp.sum(do_BGRSK.astype(wide) * o_BGRSK, axis=-1, keepdims=True)
    dqs, dk_BGSK, dv_BGSK = [], 0, 0
    for block in _blocks(S):
        q_BGRQK, do_BGRQK = q_BGRSK[..., block, :], do_BGRSK[..., block, :]
        k_BGNK, v_BGNK = _up_to(block, k_BGSK, v_BGSK)
        p_BGRQN = jnp.exp(_scores(q_BGRQK, k_BGNK) - l_BGRS1[..., block, :])
        dp_BGRQN = jnp.einsum("bgrqk,bgnk->bgrqn", do_BGRQK, v_BGNK, preferred_element_type=wide)
        ds_BGRQN = p_BGRQN * (dp_BGRQN - inner_BGRS1[..., block, :]) * q_BGRQK.shape[-1] ** -0.5
        p_BGRQN, ds_BGRQN = p_BGRQN.astype(dtype), ds_BGRQN.astype(dtype)
        dqs.append(jnp.einsum("bgrqn,bgnk->bgrqk", ds_BGRQN, k_BGNK))
        dk_BGNK = jnp.einsum("bgrqn,bgrqk->bgnk", ds_BGRQN, q_BGRQK, preferred_element_type=wide)
        dv_BGNK = jnp.einsum("bgrqn,bgrqk->bgnk", p_BGRQN, do_BGRQK, preferred_element_type=wide)
        behind = ((0, 0), (0, 0), (0, S - block.stop), (0, 0))
        dk_BGSK, dv_BGSK = dk_BGSK + jnp.pad(dk_BGNK, behind), dv_BGSK + jnp.pad(dv_BGNK, behind)
    return jnp.concatenate(dqs, axis=-2), dk_BGSK.astype(dtype), dv_BGSK.astype(dtype)


def _up_to(block: slice, *arrays):
    return (array[..., : block.stop, :] for array in arrays)


blocked_attention.defvjp(_forward, _backward)
