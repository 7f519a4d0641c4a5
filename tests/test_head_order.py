"""The order of rows in heads of q and k: Hugging Face's rotations, and the way there and back."""

from __future__ import annotations

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from converters import head_order
from converters.parts import parts_of
from converters.shards import Shard
from converters.tables import Rule, Table
from jaxserve.models import registry, rope
from tests.checkpoints import make_config

torch = pytest.importorskip("torch")
ORDERS = {
    "phi3": head_order.half_split,
    "glm4": head_order.interleaved,
    "cohere2": head_order.interleaved,
}
HEAD = 16


def config_of(family: str, partial: float = 1.0):
    config = registry.config_from_hf(make_config(family))
    turn = dataclasses.replace(config.rope, type="default", partial=partial, attention_factor=1.0)
    return dataclasses.replace(config, head_dim=HEAD, rope=turn)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("family", "partial"),
    [*itertools.product(("phi3", "glm4"), (1.0, 0.75, 0.5, 0.125)), ("cohere2", 1.0)],
)
def test_rotated_as_hugging_face_rotates(family, partial):
    """Each rotated head in its new order, and with that all scores."""
    from transformers.models.cohere2 import modeling_cohere2
    from transformers.models.glm4 import modeling_glm4
    from transformers.models.phi3 import modeling_phi3

    module = {"phi3": modeling_phi3, "glm4": modeling_glm4, "cohere2": modeling_cohere2}[family]
    config = config_of(family, partial)
    order = np.array(ORDERS[family](config))
    assert sorted(order) == list(range(HEAD))
    positions = np.array([0, 1, 2, 50, 3000])
    angles = positions[:, None] * rope.inverse_frequencies(config.rope, HEAD)
    table = np.concatenate([angles, angles], axis=-1)
    if family == "cohere2":
        table = np.repeat(angles, 2, axis=-1)
    q, k = random(5, 4, HEAD), random(5, 2, HEAD, seed=1)
    cos, sin = (torch.from_numpy(f(table).astype(np.float32))[None] for f in (np.cos, np.sin))
    theirs = module.apply_rotary_pos_emb(
        torch.from_numpy(q)[None], torch.from_numpy(k)[None], cos, sin, unsqueeze_dim=2
    )
    ours = rope.cos_sin(config.rope, HEAD, jnp.asarray(positions))
    for mine, other in zip((q, k), theirs, strict=True):
        found = rope.rotate(jnp.asarray(mine[..., order]), *ours)
        np.testing.assert_allclose(found, other[0].numpy()[..., order], rtol=0, atol=1e-3)


def rule(fused: bool, transpose: bool = True) -> Rule:
    names = ("qkv",) if fused else ("q", "k", "v")
    return Rule(
        "layers.{i}.kernel",
        names,
        transpose,
        widths=lambda c: (c.num_heads * HEAD, c.num_kv_heads * HEAD, c.num_kv_heads * HEAD),
        groups=lambda c: c.num_kv_heads,
        orders=lambda c: (head_order.interleaved(c), head_order.interleaved(c), None),
    )


@pytest.mark.parametrize("transpose", [True, False], ids=["kernel", "bias"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_layout_is_inverted_and_cut(fused, transpose):
    """Whole tensors come back as they were, and any cut holds what the whole holds there."""
    config = config_of("glm4", partial=0.75)
    width = (config.num_heads + 2 * config.num_kv_heads) * HEAD
    shape = (6, width) if transpose else (width,)
    parts = parts_of("layers.3.kernel", shape, config, Table((rule(fused, transpose),)))
    assert [part.name for part in parts] == (["qkv"] if fused else ["q", "k", "v"])
    tensors = [random(*part.shape, seed=number) for number, part in enumerate(parts)]

    def filled(bounds):
        shard = Shard(bounds, ())
        array = np.full(shard.shape, np.nan, np.float32)
        for part, tensor in zip(parts, tensors, strict=True):
            target = part.target(shard, array)
            for first in range(0, len(tensor), 7):  # blocks that end within heads
                target.take(first, tensor[first : first + 7])
        return array

    whole = filled(tuple((0, size) for size in shape))
    for part, tensor in zip(parts, tensors, strict=True):
        back = part.of(whole)
        np.testing.assert_array_equal(back.T if transpose else back, tensor)
    group = whole.reshape(*shape[:-1], config.num_kv_heads, -1, HEAD)[..., 1, :, :]
    stacked = np.concatenate(tensors)
    q, k, v = np.split(stacked, np.cumsum([config.num_heads, config.num_kv_heads]) * HEAD)
    order = np.array(head_order.interleaved(config))
    for found, (tensor, head) in enumerate([(q, 2), (q, 3), (k, 1), (v, 1)]):
        rows = tensor[head * HEAD : (head + 1) * HEAD]
        rows = rows if tensor is v else rows[order]
        np.testing.assert_array_equal(group[..., found, :], rows.T if transpose else rows)
    for start, stop in itertools.combinations(range(0, width + 1, 12), 2):
        rows = ((2, 5),) if transpose else ()
        want = whole[..., start:stop]
        cut = filled((*rows, (start, stop)))
        np.testing.assert_array_equal(cut, want[2:5] if transpose else want)


def test_weights_of_a_norm_over_a_head_follow():
    config = config_of("phi3", partial=0.5)
    one = Rule("layers.{i}.norm", ("norm",), orders=lambda c: (head_order.half_split(c),))
    [part] = parts_of("layers.0.norm", (HEAD,), config, Table((one,)))
    tensor, array = random(HEAD), np.zeros(HEAD, np.float32)
    part.target(Shard(((0, HEAD),), ()), array).take(0, tensor)
    np.testing.assert_array_equal(array, tensor[list(head_order.half_split(config))])
    np.testing.assert_array_equal(part.of(array), tensor)


def test_rows_that_keep_their_order_are_read_as_they_lie():
    """Straight from the file into memory, without a block in between."""
    config = config_of("glm4", partial=0.5)
    shape = (6, (config.num_heads + 2 * config.num_kv_heads) * HEAD)
    parts = parts_of("layers.0.kernel", shape, config, Table((rule(fused=False),)))
    whole = Shard(tuple((0, size) for size in shape), ())
    targets = [part.target(whole, np.zeros(shape, np.float32)) for part in parts]
    q, k, v = (target.runs for target in targets)
    assert len(v) == config.num_kv_heads and all(step == 1 for *_, step in v)
    assert max(step for *_, step in q) == 2 and len(k) <= 4 * config.num_kv_heads
