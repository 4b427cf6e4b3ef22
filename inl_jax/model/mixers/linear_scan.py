"""Linear recurrences by channel, in parallel over the positions.

Shapes: B batch, S tokens given, n chunks of K of them, D width.
"""

import functools
import operator

import jax
import jax.numpy as jnp

CHUNK = 8  # positions of a chunk: XLA makes one loop of so short a chain, on CPUs and on GPUs


def linear_scan(decay, drive_BSD) -> jax.Array:
    """`h_i = decay_i h_(i-1) + drive_i` from 0, in two passes over chunks of K positions.

    The first pass finds the last `h` of every chunk that starts from 0. These follow a recurrence
    of the same form, whose decays are the products over the chunks, and give the `h` that each
    chunk really starts from, for the second pass.

    Args:
      decay: [D], the same at all positions, or [B, S, D].
      drive_BSD: in the type of `decay`.
    """
    B, S, D = drive_BSD.shape
    if S == 1:
        return drive_BSD

    def by_position(a_BSD):  # K arrays [B, n, D]
        padded = jnp.pad(a_BSD, ((0, 0), (0, -S % CHUNK), (0, 0)))
        a_BnKD = padded.reshape(B, -1, CHUNK, D)
        return [a_BnKD[:, :, k] for k in range(CHUNK)]

    drives = by_position(drive_BSD)
    if decay.ndim == 1:
        decays, product = [decay] * CHUNK, decay**CHUNK
    else:
        decays = by_position(decay)
        product = functools.reduce(operator.mul, decays)

    def chain(h_BnD):
        found = []
        for decay, drive_BnD in zip(decays, drives, strict=True):
            h_BnD = decay * h_BnD + drive_BnD
            found.append(h_BnD)
        return found

    last_BnD = linear_scan(product, chain(jnp.zeros_like(drives[0]))[-1])
    start_BnD = jnp.pad(last_BnD, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    return jnp.stack(chain(start_BnD), axis=2).reshape(B, -1, D)[:, :S]
