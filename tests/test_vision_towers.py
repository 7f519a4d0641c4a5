"""Every tower, and every decoder behind one, against Hugging Face's torch modules in float32."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import converters
from jaxserve.models import registry
from jaxserve.models.dense import DenseMeta, DenseOps
from jaxserve.models.vision import attention
from jaxserve.models.vision.grid import ranges
from tests import vision_models
from tests.vision_models import FAMILIES, IMAGE

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """A family's tower, jitted, and Hugging Face's whole model."""
    family = request.param
    folder = vision_models.make(family, tmp_path_factory.mktemp(family))
    loaded = converters.load(folder)
    declaration, params = loaded.tower.declaration, loaded.tower.params
    tower = jax.jit(lambda params, *inputs: declaration.bind(params)(*inputs))
    return types.SimpleNamespace(
        family=family,
        config=declaration.config,
        facts=lambda *pictures: registry.tower_of(declaration.config.architecture).facts(
            declaration.config, *pictures
        ),
        run=lambda patches, facts: np.asarray(tower(params, patches, facts)),
        loaded=loaded,
        hf=vision_models.hf_model(family, folder),
    )


def size_of(pair) -> int:
    """Patches of every run: one program a family."""
    return sum(shape.patches for shape in FAMILIES[pair.family].shapes) + 3 * pair.config.unit


def rows_of(pair, shapes, patches) -> np.ndarray:
    """The rows of the pictures, with padding behind them."""
    size = size_of(pair)
    rows = pair.run(np.pad(patches, ((0, size - len(patches)), (0, 0))), pair.facts(shapes, size))
    assert rows.shape == (size // pair.config.patches_per_token, pair.config.width)
    assert np.isfinite(rows).all()
    return rows[: len(patches) // pair.config.patches_per_token]


def test_pictures_side_by_side(pair):
    """Of different sizes, with padding behind them, and each alone."""
    shapes = FAMILIES[pair.family].shapes
    patches = vision_models.pictures(pair.config, shapes)
    inputs = vision_models.hf_inputs(pair.family, pair.config, shapes, patches)
    theirs = vision_models.hf_rows(pair.family, pair.hf, inputs)
    together = rows_of(pair, shapes, patches)
    np.testing.assert_allclose(together, theirs, rtol=0, atol=1e-4)
    first = shapes[-1].patches
    alone = rows_of(pair, shapes[-1:], patches[-first:])
    np.testing.assert_allclose(alone, together[-len(alone) :], rtol=0, atol=1e-5)


def test_facts_have_the_same_shapes_for_any_pictures(pair):
    """Those of no pictures, too: what programs are compiled for."""
    size = size_of(pair)

    def forms(shapes):
        return {name: (x.shape, x.dtype) for name, x in pair.facts(shapes, size).items()}

    found = forms(FAMILIES[pair.family].shapes)
    assert forms(()) == found
    assert {dtype for _, dtype in found.values()} <= {np.dtype("int32"), np.dtype("float32")}
    run = pair.run(np.zeros((size, pair.config.patch_width), np.float32), pair.facts((), size))
    assert np.isfinite(run).all()


def test_rows_have_the_dtype_of_the_parameters(pair):
    size = size_of(pair)
    half = registry.declare_tower(pair.config, "bfloat16")
    assert {spec.dtype for spec in half.specs.values()} == {jnp.dtype("bfloat16")}
    patches = np.zeros((size, pair.config.patch_width), np.float32)
    facts = dict(pair.facts((), size))
    rows = jax.eval_shape(lambda p, x, f: half.bind(p)(x, f), dict(half.specs), patches, facts)
    assert (rows.shape[1], rows.dtype) == (pair.config.width, jnp.dtype("bfloat16"))


def prompt_of(pair, shapes) -> np.ndarray:
    """Text, a picture, text, ..., text."""
    rng = np.random.default_rng(5)
    parts = [rng.integers(3, 299, 4)]
    for shape in shapes:
        parts += [[302] * pair.family.startswith("qwen")]
        parts += [[IMAGE] * (shape.patches // pair.config.patches_per_token)]
        parts += [rng.integers(3, 299, 3)]
    return np.concatenate([np.asarray(part, np.int64) for part in parts])


@pytest.mark.parametrize("count", [0, 3])
def test_logits(pair, count):
    """Rows of the tower in the place of tokens, features behind the first layers, M-RoPE."""
    shapes, config = FAMILIES[pair.family].shapes[:count], pair.config
    ids = prompt_of(pair, shapes)
    where = ids == IMAGE
    rows = np.zeros((len(ids), config.rows, config.hidden_size), np.float32)
    inputs, positions, meta = {}, np.arange(len(ids), dtype=np.int32), None
    if count:
        patches = vision_models.pictures(config, shapes)
        rows[where] = rows_of(pair, shapes, patches).reshape(-1, *rows.shape[1:])
        inputs = vision_models.hf_inputs(pair.family, config, shapes, patches)
    types_ = torch.from_numpy(where.astype(np.int64))[None]
    if pair.family == "gemma3":
        inputs["token_type_ids"] = types_
        meta = DenseMeta(reach=jnp.asarray(block_ends(where)))
    if pair.family.startswith("qwen"):
        inputs["mm_token_type_ids"] = types_
    if count and pair.family.startswith("qwen"):
        found, _ = pair.hf.model.get_rope_index(
            torch.from_numpy(ids)[None],
            image_grid_thw=inputs["image_grid_thw"],
            mm_token_type_ids=types_,
        )
        positions = found[:, 0].numpy().astype(np.int32)

    @jax.jit
    def run(params, ids, rows, positions, meta):
        decoder = pair.loaded.declaration.bind(params)
        embedded = jnp.where(where[:, None], rows[:, 0], decoder.embed(ids))
        added = tuple(rows[:, i] for i in range(1, config.rows))
        hidden, _ = decoder.run(embedded, positions, None, meta, DenseOps(), added=added)
        return decoder.logits(hidden)

    ours = run(pair.loaded.params, ids.astype(np.int32), rows, positions, meta)
    with torch.no_grad():
        theirs = pair.hf(torch.from_numpy(ids)[None], **inputs).logits[0].numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def block_ends(where: np.ndarray) -> np.ndarray:
    """The last token of the block of picture's tokens that each is in, or itself."""
    ends = np.arange(len(where), dtype=np.int32)
    for i in range(len(where) - 2, -1, -1):
        if where[i] and where[i + 1]:
            ends[i] = ends[i + 1]
    return ends


def test_equal_positions_are_one(pair):
    """Text of a model with M-RoPE needs [T] only; other models have no three."""
    decoder = pair.loaded.declaration.bind(pair.loaded.params)
    positions = jnp.arange(7, 20, dtype=jnp.int32)
    if not pair.loaded.config.rope.sections:
        with pytest.raises(ValueError, match="are no sections of 8 pairs"):
            decoder.angles(jnp.stack([positions] * 3))
        return
    one, three = (decoder.angles(x) for x in (positions, jnp.stack([positions] * 3)))
    for each in one:
        for a, b in zip(one[each], three[each], strict=True):
            np.testing.assert_array_equal(a, b)


def dense(q, k, v, visible) -> np.ndarray:
    scores = np.einsum("qnh,knh->nqk", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("nqk,knh->qnh", weights / weights.sum(axis=-1, keepdims=True), v)


def random_heads(*shape: int) -> list[jax.Array]:
    rng = np.random.default_rng(len(shape))
    heads = 2 * rng.standard_normal((3, *shape, 2, 8))
    return list(jnp.asarray(heads, jnp.float32))


@pytest.mark.parametrize("lengths", [(100, 7), (513, 1000, 3, 500)])
def test_attention_within_ranges(lengths):
    """In one block, and in several with ranges that begin and end within them."""
    patches = sum(lengths) + 5
    q, k, v = random_heads(patches)
    starts, ends = ranges(lengths, patches)
    visible = (np.arange(patches) >= starts[:, None]) & (np.arange(patches) < ends[:, None])
    ours = jax.jit(attention.ranges)(q, k, v, starts, ends)
    np.testing.assert_allclose(ours, dense(q, k, v, visible), rtol=0, atol=1e-5)


def test_attention_within_windows():
    lengths = (16, 3, 16, 1, 9, 16, 5, 4)
    q, k, v = random_heads(sum(lengths) + 3)
    starts, ends = ranges(lengths, len(q))
    visible = (np.arange(len(q)) >= starts[:, None]) & (np.arange(len(q)) < ends[:, None])
    ours = attention.near(q, k, v, starts, ends, 16)
    np.testing.assert_allclose(ours, dense(q, k, v, visible), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [65, 577])
def test_attention_within_tiles(size, monkeypatch):
    """Some tiles at a time, and blocks of a tile that do not fill it."""
    monkeypatch.setattr(attention, "_SCORES", 2 * 65 * 65 * 2)
    q, k, v = random_heads(3, size)
    for ours, *each in zip(attention.tiles(q, k, v), q, k, v, strict=True):
        np.testing.assert_allclose(ours, dense(*map(np.asarray, each), True), rtol=0, atol=1e-5)


def test_attention_has_no_scores_of_all_with_all():
    """4,096 patches and 16 heads would make 1 GiB of them."""
    x = jax.ShapeDtypeStruct((4096, 16, 72), jnp.float32)
    place = jax.ShapeDtypeStruct((4096,), jnp.int32)
    limit = 256 << 20
    for function, arguments in (
        (attention.ranges, (x, x, x, place, place)),
        (lambda *qkv: attention.tiles(*(y[None] for y in qkv)), (x, x, x)),
        (lambda *rest: attention.near(*rest, 64), (x, x, x, place, place)),
    ):
        compiled = jax.jit(function).lower(*arguments).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < limit
