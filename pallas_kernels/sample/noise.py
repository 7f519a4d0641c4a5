"""Sampling noise as a pure function of (seed, sample index, position, token).

Nothing else enters: not the batch, the slot, preemption or the implementation. A row's key is
`fold_in(fold_in(jax.random.key(seed), sample_index), position)` of JAX's threefry2x32, of 20
rounds; the words of its tokens are of 13, the fewest that pass BigCrush, because they are most of
what a draw computes. Tokens come in blocks of 2 * HALF, and one threefry call serves two tokens,
HALF apart, so no word is wasted:

    tokens of block n   | 2n*HALF ...  +HALF-1 | +HALF ...  +2*HALF-1 |
    counters            | n*HALF ...   +HALF-1 | the same counters    |
    word                |          0           |          1           |

Counters n*HALF + r < (n+1)*HALF with any power of two of them in a row stay inside a block, so the
tokens of a kernel's tile are two contiguous runs. Plain integer arithmetic on uint32, which also
lowers inside a Pallas kernel. Threefry: Salmon et al., "Parallel random numbers: as easy as 1, 2,
3" (2011), table 2.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

HALF = 2048
ROUNDS = 13  # of the words of tokens
_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_PARITY = 0x1BD11BDA
# log(1 + f) = f - f^2/2 + f^3 P(f) for f in [-1/3, 1/3]: minimax in relative error, lowest first
_LOG = (
    0.3333326578140259, -0.25004252791404724, 0.20007944107055664, -0.16471898555755615,
    0.14041787385940552, -0.15125204622745514, 0.13823293149471283,
)  # fmt: skip
_LN2 = 0.6931471805599453
_TWO_THIRDS = 0x3F2AAAAB


# as gumbel, jitted so that kernels of one width share a trace
@functools.partial(jax.jit, static_argnames="rounds")
def threefry2x32(
    key0: jax.Array, key1: jax.Array, x0: jax.Array, x1: jax.Array, *, rounds: int
) -> tuple[jax.Array, jax.Array]:
    """Two random words for a key of two words and a counter of two words, all uint32."""
    keys = (key0, key1, key0 ^ key1 ^ jnp.uint32(_PARITY))
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for done in range(1, rounds + 1):
        distance = _ROTATIONS[(done - 1) % 8]
        x0 = x0 + x1
        left = lax.shift_left(x1, jnp.full_like(x1, distance))
        x1 = x0 ^ (left | lax.shift_right_logical(x1, jnp.full_like(x1, 32 - distance)))
        i, rest = divmod(done, 4)
        if rest == 0:
            x0, x1 = x0 + keys[i % 3], x1 + keys[(i + 1) % 3] + jnp.uint32(i)
    return x0, x1


def row_keys(
    seeds: jax.Array, samples: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The two key words [B] uint32 of rows with `seeds`, `samples`, `positions` [B] int32 (the bits
    of uint32)."""
    zero = jnp.zeros(seeds.shape, jnp.uint32)
    key = (zero, seeds.astype(jnp.uint32))
    for data in (samples, positions):
        key = threefry2x32(*key, zero, data.astype(jnp.uint32), rounds=20)
    return key


def log(x: jax.Array) -> jax.Array:
    """Natural logarithm of positive normal float32 numbers, within 1.5 units in the last place.

    The same few operations everywhere, where the libraries of CPU and GPU differ, and fewer of them
    than in libraries, which also serve zero, infinity and denormals. x = 2^k m, m in [2/3, 4/3).
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    power = (bits - _TWO_THIRDS) & -0x800000
    f = lax.bitcast_convert_type(bits - power, jnp.float32) - 1.0
    tail = jnp.full_like(f, _LOG[-1])
    for coefficient in _LOG[-2::-1]:
        tail = tail * f + coefficient
    return power.astype(jnp.float32) * (_LN2 * 2.0**-23) + (f + f * f * (f * tail - 0.5))


def exponential(bits: jax.Array) -> jax.Array:
    """Standard exponential float32 numbers of uint32 `bits`: in [2^-33, 17.4] for each of the 2^32.

    w = (bits + 1/2) / 2^32 is uniform in (0, 1]; -log(1 - w) loses all digits of a small w, whose
    series is therefore used.
    """
    w = (bits.astype(jnp.float32) + 0.5) * jnp.float32(2.0**-32)
    series = w * (1.0 + w * 0.5)
    return jnp.where(w < 1e-3, series, -log(jnp.maximum(1.0 - w, 2.0**-25)))


@jax.jit
def gumbel(bits: jax.Array) -> jax.Array:
    """Standard Gumbel float32 numbers of uint32 `bits`, in [-2.9, 22.9]."""
    return -log(exponential(bits))


def counter_count(vocab: int) -> int:
    """How many counters the tokens below `vocab` use."""
    blocks, rest = divmod(vocab, 2 * HALF)
    return blocks * HALF + min(rest, HALF)


def gumbel_rows(key0: jax.Array, key1: jax.Array, vocab: int) -> jax.Array:
    """Gumbel noise [B, vocab] float32 of rows with key words `key0`, `key1` [B] uint32."""
    count = counter_count(vocab)
    counters = jnp.broadcast_to(jnp.arange(count, dtype=jnp.uint32), (key0.shape[0], count))
    keys = key0[:, None], key1[:, None]
    low, high = threefry2x32(*keys, counters, jnp.zeros_like(counters), rounds=ROUNDS)
    blocks, rest = divmod(vocab, 2 * HALF)
    whole = blocks * HALF
    rows = key0.shape[0]
    pairs = [word[:, :whole].reshape(rows, blocks, 1, HALF) for word in (low, high)]
    ends = [low[:, whole:], high[:, whole : whole + max(rest - HALF, 0)]]
    bits = [jnp.concatenate(pairs, axis=2).reshape(rows, 2 * whole), *ends]
    return gumbel(jnp.concatenate(bits, axis=1))
