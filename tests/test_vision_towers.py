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
from pallas_kernels import range_attention
from tests import vision_models
from tests.marks import long_but
from tests.vision_models import FAMILIES, IMAGE

torch = pytest.importorskip("torch")


@pytest.fixture(
    scope="module",
    params=long_but(FAMILIES, "qwen2_5_vl", "qwen3_vl", "gemma3", "smolvlm", "llava"),
)
def pair(request, tmp_path_factory):
    """A family's tower, jitted, and Hugging Face's whole model."""
    family = request.param
    folder = vision_models.make(family, tmp_path_factory.mktemp(family))
    loaded = converters.load(folder)
    declaration, params = loaded.tower.declaration, loaded.tower.params
    tower = jax.jit(lambda params, *inputs: declaration.bind(params)(*inputs, range_attention))
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

    def run(params, patches, facts):
        return half.bind(params)(patches, facts, range_attention)

    rows = jax.eval_shape(run, dict(half.specs), patches, facts)
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
