"""The operations that models leave to their caller, plain and paged, against NumPy; and the seams
of the decoder that no family here uses."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve.attention.meta import DecodeMeta, ExtendMeta
from jaxserve.attention.paged import Cache, PagedOps
from jaxserve.models import registry, rope
from jaxserve.models.decoder import Attention, Decoder, Layer
from jaxserve.models.dense import DenseMeta, DenseOps
from jaxserve.models.layers import MLP, RMSNorm
from jaxserve.models.make import Make
from jaxserve.models.ops import AttentionSpec, Residual
from jaxserve.step.hooked import TappedOps, Taps
from tests.checkpoints import make_config
from tests.machines import CPU

N, K, H = 4, 2, 8
PAGES, PAGE_SIZE, LAYERS = 6, 4, 2
PAGED = PagedOps(None, None, PAGES, CPU.crossovers)
SPECS = {
    "plain": {},
    "soft cap": {"soft_cap": 2.0},
    "soft cap and window": {"soft_cap": 0.5, "window": 5},
}


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def attention(qkv: np.ndarray, spec: AttentionSpec, blocks: tuple[range, ...] = ()) -> np.ndarray:
    """[T, N * H]: each token and head by itself, without rotation. blocks: tokens that see each
    other."""
    groups = qkv.reshape(len(qkv), K, N // K + 2, H).astype(np.float64)
    q, k, v = groups[:, :, :-2].reshape(len(qkv), N, H), groups[:, :, -2], groups[:, :, -1]
    out = np.zeros_like(q)
    for t in range(len(qkv)):
        first = 0 if spec.window is None else max(0, t + 1 - spec.window)
        stop = max([t + 1, *(block.stop for block in blocks if t in block)])
        for n in range(N):
            scores = k[first:stop, n // (N // K)] @ q[t, n] * spec.scale
            if spec.soft_cap is not None:
                scores = spec.soft_cap * np.tanh(scores / spec.soft_cap)
            weights = np.exp(scores) / np.exp(scores).sum()
            out[t, n] = weights @ v[first:stop, n // (N // K)]
    return out.reshape(len(qkv), -1)


@pytest.fixture(params=SPECS)
def spec(request):
    facts = {"window": None, "scale": 1.0, "eps": 0.0} | SPECS[request.param]
    return AttentionSpec(1, num_heads=N, num_kv_heads=K, head_dim=H, **facts)


def unturned(tokens: int):
    return jnp.ones((tokens, H // 2)), jnp.zeros((tokens, H // 2))


def test_dense_attention(spec):
    qkv = random(13, (N + 2 * K) * H)
    out, _ = DenseOps().attend(jnp.asarray(qkv), *unturned(13), None, None, spec)
    np.testing.assert_allclose(out, attention(qkv, spec), rtol=0, atol=1e-5)


def test_paged_attention_of_a_prompt_and_a_token_behind_it(spec):
    qkv = random(13, (N + 2 * K) * H)
    want = attention(qkv, spec)
    pages = np.asarray([[4, 0, 3, 2]], np.int32)
    slots = pages[0, np.arange(16) // PAGE_SIZE] * PAGE_SIZE + np.arange(16) % PAGE_SIZE
    slots[12:] = LAYERS * PAGES * PAGE_SIZE + np.arange(4)  # padding
    shape = (LAYERS * PAGES, PAGE_SIZE, K, H)
    cache = Cache(jnp.full(shape, jnp.nan), jnp.full(shape, jnp.nan), jnp.zeros(K, jnp.int32))

    def ints(*values):
        return jnp.asarray(values, jnp.int32)

    meta = ExtendMeta(jnp.asarray(slots, jnp.int32), jnp.asarray(pages), ints(0), ints(12), ints(0))
    padded = jnp.asarray(np.concatenate([qkv[:12], random(4, qkv.shape[1], seed=1)]))
    out, cache = PAGED.attend(padded, *unturned(16), cache, meta, spec)
    np.testing.assert_allclose(out[:12], want[:12], rtol=0, atol=1e-5)
    meta = DecodeMeta(ints(pages[0, 3] * PAGE_SIZE), jnp.asarray(pages), ints(13))
    out, _ = PAGED.attend(jnp.asarray(qkv[12:]), *unturned(1), cache, meta, spec)
    np.testing.assert_allclose(out, want[12:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("spec", ["plain", "soft cap and window"], indirect=True)
def test_blocks_see_all_of_themselves(spec):
    """In plain mathematics, and in pages, in two steps."""
    blocks = (
        range(3),
        range(4, 8),
        range(8, 15),
    )  # at a start, longer than the window, side by side
    qkv = random(16, (N + 2 * K) * H)
    want = attention(qkv, spec, blocks)
    reach = np.arange(16, dtype=np.int32)
    for block in blocks:
        reach[block] = block.stop - 1
    assert np.abs(want - attention(qkv, spec)).max() > 0.1
    out, _ = DenseOps().attend(
        jnp.asarray(qkv), *unturned(16), None, DenseMeta(reach=jnp.asarray(reach)), spec
    )
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-5)

    pages = jnp.asarray([[4, 0, 3, 2]], jnp.int32)
    slots = pages[0, np.arange(16) // PAGE_SIZE] * PAGE_SIZE + np.arange(16) % PAGE_SIZE
    shape = (LAYERS * PAGES, PAGE_SIZE, K, H)
    cache = Cache(jnp.full(shape, jnp.nan), jnp.full(shape, jnp.nan), jnp.zeros(K, jnp.int32))
    for prefix in (0, 8):
        mine = slice(prefix, prefix + 8)
        lens = (jnp.asarray([x], jnp.int32) for x in (0, 8, prefix))
        meta = ExtendMeta(slots[mine], pages, *lens, reach=jnp.asarray(reach[mine]))
        out, cache = PAGED.attend(jnp.asarray(qkv[mine]), *unturned(8), cache, meta, spec)
        np.testing.assert_allclose(out, want[mine], rtol=0, atol=1e-5)


@pytest.mark.parametrize("spec", ["soft cap and window"], indirect=True)
def test_blocks_in_sequences_side_by_side(spec):
    qkv, (a, b) = random(13, (N + 2 * K) * H), (slice(0, 6), slice(6, 13))
    want = [attention(qkv[a], spec, (range(2, 6),)), attention(qkv[b], spec, (range(4),))]
    reach = jnp.asarray([0, 1, 5, 5, 5, 5, 9, 9, 9, 9, 10, 11, 12])
    meta = DenseMeta(jnp.asarray([0] * 6 + [1] * 7), reach)
    out, _ = DenseOps().attend(jnp.asarray(qkv), *unturned(13), None, meta, spec)
    np.testing.assert_allclose(out, np.concatenate(want), rtol=0, atol=1e-5)


class SumLeft(PagedOps):
    """As on a GPU, where a kernel makes the sum with the next norm."""

    def _leaves_the_sum(self, y, kernel) -> bool:
        return True


OPS = [DenseOps(), PAGED, SumLeft(None, None, PAGES, CPU.crossovers)]
OPS_NAMES = ["dense", "paged", "left"]


@pytest.mark.parametrize("ops", OPS, ids=OPS_NAMES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("factor", [1.0, 0.22])
def test_a_norm_and_a_factor_behind_a_product(ops, bias, factor):
    y, kernel, x = random(5, 6), random(6, 8, seed=1), random(5, 8, seed=2)
    norm, after = 1 + random(8, seed=3), 1 + random(8, seed=4)
    added = 3 * random(8, seed=5) if bias else np.zeros(8, np.float32)
    product = y @ kernel + added
    rms = np.sqrt((product**2).mean(-1, keepdims=True) + 0.25)
    total = x + product / rms * norm * factor
    want = total / np.sqrt((total**2).mean(-1, keepdims=True) + 1e-6) * after
    stream = ops.linear_out(
        jnp.asarray(y), jnp.asarray(kernel), Residual(jnp.asarray(x)),
        bias=jnp.asarray(added) if bias else None, norm=jnp.asarray(norm), eps=0.25, factor=factor,
    )  # fmt: skip
    assert (stream.pending is not None) == isinstance(ops, SumLeft)
    np.testing.assert_allclose(ops.norm(stream, jnp.asarray(after), 1e-6), want, rtol=0, atol=1e-5)
    np.testing.assert_allclose(ops.total(stream), total, rtol=0, atol=1e-5)
    # a product that reads the stream as it is
    read, stream = ops.linear_in(stream, jnp.asarray(kernel.T), norm=None, eps=0.0)
    np.testing.assert_allclose(read, total @ kernel.T, rtol=0, atol=1e-4)
    assert stream.pending is None
    np.testing.assert_allclose(stream.x, total, rtol=0, atol=1e-5)
    only = ops.linear_out(jnp.asarray(y), jnp.asarray(kernel), stream, factor=factor)
    want = total + (y @ kernel) * factor
    np.testing.assert_allclose(ops.total(only), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ops", OPS, ids=OPS_NAMES)
@pytest.mark.parametrize("norm_behind", [False, True])
def test_a_parallel_block(ops, norm_behind):
    """Two products read a stream through a LayerNorm, then two write to it; and so once more, where
    a sum may have been left."""
    x, weights = 3 + random(5, 8), 1 + random(8, seed=1)
    kernels = [random(8, 8, seed=seed) for seed in range(2, 8)]
    behind = {"norm": jnp.asarray(1 + random(8, seed=9)), "eps": 0.25} if norm_behind else {}

    def layer_norm(x):
        y = x - x.mean(-1, keepdims=True)
        return y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-3) * weights

    def written(y):
        if not norm_behind:
            return y
        return y / np.sqrt((y**2).mean(-1, keepdims=True) + 0.25) * (1 + random(8, seed=9))

    stream, want = Residual(jnp.asarray(x)), x.astype(np.float64)
    norm = {"norm": jnp.asarray(weights), "eps": 1e-3, "centred": True}
    for one, two, out in (kernels[:3], kernels[3:]):
        a, stream = ops.linear_in(stream, jnp.asarray(one), **norm)
        b, stream = ops.linear_in(stream, jnp.asarray(two), **norm)
        np.testing.assert_allclose(a, layer_norm(want) @ one, rtol=0, atol=1e-4)
        np.testing.assert_allclose(b, layer_norm(want) @ two, rtol=0, atol=1e-4)
        for y in (a, b):
            stream = ops.linear_out(y, jnp.asarray(out), stream, **behind)
        assert (stream.pending is not None) == isinstance(ops, SumLeft)
        want = want + sum(written(layer_norm(want) @ k @ out) for k in (one, two))
        np.testing.assert_allclose(ops.total(stream), want, rtol=0, atol=1e-3)
    found = ops.norm(stream, jnp.asarray(weights), 1e-3, centred=True)
    np.testing.assert_allclose(found, layer_norm(want), rtol=0, atol=1e-4)


class Doubled(Taps):
    """They double what the MLP of layer 0 adds."""

    def __init__(self):
        """There are no tokens to tell apart."""

    def at(self, point):
        return point == "layer.0.mlp_out"

    def touch(self, point, x):
        return 2 * x


@pytest.mark.parametrize("ops", OPS[1:], ids=OPS_NAMES[1:])
def test_a_hook_in_a_parallel_block(ops):
    """What attention adds may still be pending where the MLP's is looked at alone."""
    tapped = TappedOps(ops, Doubled())
    x, a, b = random(5, 8), random(5, 6, seed=1), random(5, 6, seed=2)
    kernels = [random(6, 8, seed=seed) for seed in (3, 4)]
    stream = Residual(jnp.asarray(x))
    for y, kernel in zip((a, b), kernels, strict=True):
        stream = tapped.linear_out(jnp.asarray(y), jnp.asarray(kernel), stream)
    want = x + a @ kernels[0] + 2 * b @ kernels[1]
    np.testing.assert_allclose(ops.total(stream), want, rtol=0, atol=1e-5)


class TwoRopes(Layer):
    """The second layer turns faster."""

    def __init__(self, config, index, make):
        super().__init__(config, index, make)
        if index == 1:
            self.rope = dataclasses.replace(config.rope, theta=100.0)


class TwoRopesDecoder(Decoder):
    layer = TwoRopes


@pytest.fixture(scope="module")
def config():
    return registry.config_from_hf(make_config("llama"))


def make() -> Make:
    return Make(jnp.dtype("float32"), nnx.Rngs(0))


def test_each_layer_gets_the_rope_that_it_asks_for(config):
    model, plain = TwoRopesDecoder(config, make()), Decoder(config, make())
    ids, positions = jnp.arange(20), jnp.arange(20)
    turned = [rope.cos_sin(layer.rope, config.head_dim, positions) for layer in model.layers]
    assert float(jnp.abs(turned[0][0] - turned[1][0]).max()) > 1
    stream = Residual(model.embed(ids))
    for layer, angles in zip(model.layers, turned, strict=True):
        stream, _ = layer(stream, *angles, None, None, DenseOps())
    want = model.final_norm(stream.x)
    hidden, _ = model(ids, positions, None, None, DenseOps())
    np.testing.assert_array_equal(hidden, want)
    assert float(jnp.abs(hidden - plain(ids, positions, None, None, DenseOps())[0]).max()) > 1e-3


def test_what_is_embedded_may_stand_in_a_tokens_place(config):
    model = Decoder(config, make())
    positions = jnp.arange(6)
    want, _ = model(jnp.asarray([1, 2, 300, 4, 5, 6]), positions, None, None, DenseOps())
    image = model.embed.embedding[...][300]
    embedded = model.embed(jnp.asarray([1, 2, 3, 4, 5, 6])).at[2].set(image)
    hidden, _ = model.run(embedded, positions, None, None, DenseOps())
    np.testing.assert_array_equal(hidden, want)


@pytest.mark.parametrize("quantization", [None, "fp8"])
@pytest.mark.parametrize(
    ("part", "reads", "writes"), [(Attention, "qkv", "o"), (MLP, "gate_up", "down")]
)
def test_halves_of_a_layer_are_layers(config, part, reads, writes, quantization):
    """What reads the stream is cut along its last axis, what writes to it along its first. Each
    half is a layer of half the heads or columns, and together they add what the whole does."""
    config = dataclasses.replace(config, attention_bias=True, mlp_bias=True)
    halved = ("num_heads", "num_kv_heads", "intermediate_size")
    smaller = dataclasses.replace(config, **{name: getattr(config, name) // 2 for name in halved})
    maker = dataclasses.replace(make(), quantization=quantization)
    norm = RMSNorm(config.hidden_size, maker, eps=1e-6)
    stream = Residual(jnp.asarray(random(7, config.hidden_size)))
    angles = rope.cos_sin(config.rope, config.head_dim, jnp.arange(7))

    def added(module):
        if part is MLP:
            return module(stream, DenseOps(), norm).x - stream.x
        return module(stream, norm, *angles, None, None, DenseOps())[0].x - stream.x

    def half(number):
        made = part(smaller, 0, maker)
        for name, axis in ((reads, -1), (writes, 0)):
            mine, theirs = getattr(made, name), getattr(whole, name)
            for parameter in ("kernel", "bias", "kernel_scale"):
                value = getattr(theirs, parameter)
                if value is None:
                    continue
                value = value[...]
                if axis == -1 or parameter == "kernel":
                    value = jnp.split(value, 2, axis=axis)[number]
                assert value.shape == getattr(mine, parameter)[...].shape
                setattr(mine, parameter, nnx.Param(value))
        return made

    whole = part(config, 0, maker)
    reading = getattr(whole, reads)
    reading.bias = nnx.Param(jnp.asarray(random(*reading.bias[...].shape, seed=1)))
    want = added(whole)
    assert float(jnp.abs(want).max()) > 1e-3
    np.testing.assert_allclose(added(half(0)) + added(half(1)), want, rtol=0, atol=1e-6)
