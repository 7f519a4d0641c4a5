"""The whole steps, with the kernels of a Hopper GPU, lowered for CUDA on this machine."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from benchmarks.workloads import SHAPES, with_tower
from jaxserve.attention.cut import CutOps
from jaxserve.attention.paged import PagedOps
from jaxserve.cache.pool import make_cache
from jaxserve.config import EngineConfig
from jaxserve.media.normal import Normal
from jaxserve.models import registry
from jaxserve.packing.buckets import Buckets
from jaxserve.packing.layout import ExtendLayout
from jaxserve.sampler.sampler import Sampler
from jaxserve.server_args import ServerArgs
from jaxserve.step import decode, pictures, products, step
from jaxserve.step.payloads import USUAL
from jaxserve.step.state import initial_state
from jaxserve.weights import kept
from pallas_kernels import Device, compat, range_attention
from pallas_kernels.all_reduce.workspace import COMM_WORDS
from tests.kernels.support import quiet
from tests.machines import GPU
from tests.marks import long

pytestmark = quiet
H100 = Device("gpu", "NVIDIA H100 80GB HBM3", (9, 0), 132)
PAGES = 64


def declared(shape, quantization=None):
    """(config, engine's config, model as a step sees it, parameters) of two layers of a shape."""
    model = registry.config_from_hf({**SHAPES[shape], "num_hidden_layers": 2, "vocab_size": 4096})
    engine = EngineConfig.resolve(ServerArgs("x", context_length=2048), model, GPU, 0)
    declaration = registry.declare(model, jnp.bfloat16, quantization)
    names = tuple(declaration.specs)
    stepped = step.StepModel(
        bind=lambda params: declaration.bind(dict(zip(names, params, strict=True))),
        ops=PagedOps(None, None, PAGES, GPU.crossovers),
        sampler=Sampler(engine.program.max_top_logprobs, False, None),
        page_size=engine.program.page_size,
        payloads=USUAL.payloads,
    )
    return model, engine, stepped, tuple(declaration.specs.values())


@pytest.fixture(autouse=True, scope="module")
def on_an_h100():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pallas_kernels.registry.current_device", lambda: H100)
        yield


def stepping(stepped, engine, kind, size, steps=1):
    """The function of the program `kind` of bucket `size`, and what a call uploads."""
    if kind == "decode":
        function, upload = functools.partial(decode.decode_steps, stepped, steps), (2, size)
    else:
        rows = engine.buckets.extend_rows(size)
        layout = ExtendLayout(size, rows, engine.program.table_width)
        function, upload = functools.partial(step.extend_step, stepped, layout), (layout.size,)
    return function, jax.ShapeDtypeStruct(upload, jnp.int32)


@functools.cache
def lowered(shape, kind, size, *, quantization=None, kv="bfloat16", steps=1):
    """StableHLO of the program `kind` of bucket `size`, two layers of a real shape."""
    model, engine, stepped, params = declared(shape, quantization)
    config = engine.program
    cache = jax.eval_shape(
        lambda: make_cache(model, PAGES, config.page_size, config.max_rows, jnp.dtype(kv))
    )
    state = jax.eval_shape(lambda: initial_state(config, model.vocab_size))
    function, uploaded = stepping(stepped, engine, kind, size, steps)
    return compat.lower_for_cuda(function, params, cache, *state, uploaded)


@pytest.mark.parametrize(
    ("shape", "kind", "size"),
    [
        ("llama-3.1-8b", "extend", 512),
        ("qwen2.5-0.5b", "decode", 1),
        ("qwen3-0.6b", "decode", 256),
        long("llama-3.1-8b", "decode", 1),
        long("llama-3.1-8b", "decode", 256),
        long("qwen2.5-0.5b", "decode", 256),
        long("qwen2.5-0.5b", "extend", 512),
        long("qwen3-0.6b", "decode", 1),
        long("qwen3-0.6b", "extend", 512),
    ],
)
def test_steps_use_the_kernels(shape, kind, size):
    text = lowered(shape, kind, size)
    for kernel in ("rope_kv_write", "paged_decode" if kind == "decode" else "mosaic_gpu", "sample"):
        assert kernel in text
    assert ("@add_norm" in text) == (size > 1)


@pytest.mark.parametrize("quantization", ["fp8", "w8a16_int8"])
def test_quantized_steps_lower(quantization):
    text = lowered("llama-3.1-8b", "decode", 8, quantization=quantization, kv="float8_e4m3fn")
    assert "paged_decode" in text


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("qwen2.5-0.5b", 1),
        long("llama-3.1-8b", 1),
        long("llama-3.1-8b", 256),
        long("qwen2.5-0.5b", 256),
        long("qwen3-0.6b", 1),
        long("qwen3-0.6b", 256),
    ],
)
def test_several_decode_steps_lower_as_one_program(shape, size):
    """The same kernels, in a loop."""
    single = lowered(shape, "decode", size)
    several = lowered(shape, "decode", size, steps=4)
    for kernel in ("rope_kv_write", "paged_decode", "sample"):
        assert several.count(f"func.func private @{kernel}") > 0
        assert several.count(kernel) >= single.count(kernel)
    assert several.count("stablehlo.while") == single.count("stablehlo.while") + 1
    assert f"tensor<4x{size}xi32>" in several


@pytest.mark.long
def test_several_steps_of_a_quantized_model_lower():
    text = lowered("llama-3.1-8b", "decode", 8, quantization="fp8", kv="float8_e4m3fn", steps=4)
    assert "paged_decode" in text


@pytest.mark.parametrize(
    ("shape", "kind", "size"),
    [
        ("llama-3.1-8b", "extend", 512),
        ("qwen2.5-0.5b", "decode", 8),
        long("llama-3.1-8b", "decode", 8),
        long("llama-3.1-8b", "decode", 64),
        long("llama-3.1-8b", "extend", 64),
        long("qwen2.5-0.5b", "decode", 64),
        long("qwen2.5-0.5b", "extend", 64),
        long("qwen2.5-0.5b", "extend", 512),
    ],
)
def test_the_products_alone_are_those_of_the_steps(shape, kind, size):
    """Else XLA would not have chosen their kernels when a step is compiled beside requests."""
    step_text = lowered(shape, kind, size)
    model, _, stepped, params = declared(shape)

    def multiplied(function, *arguments):
        text = compat.lower_for_cuda(functools.partial(function, stepped), params, *arguments)
        assert "rope_kv_write" not in text and "paged" not in text
        return dots(text)

    width = model.num_heads * model.head_dim
    attended = jax.ShapeDtypeStruct((size, width), jnp.bfloat16)
    rows = Buckets.extend_rows(size) if kind == "extend" else size
    hidden = jax.ShapeDtypeStruct((rows, model.hidden_size), jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((size,), jnp.int32)
    layers = multiplied(products.layer_products, (attended,) * 2, tokens)
    head = multiplied(products.head_product, hidden)
    assert len(head) == 1 and dots(step_text) == layers | head


def dots(text):
    """Shapes and types of the products in a program."""
    return set(re.findall(r"stablehlo\.dot_general .*?: (\(.*)", text))


def lowered_cut(shape, kind, size, parts):
    """As `lowered`, of a model that is cut over `parts` GPUs: what each of them runs."""
    model, engine, whole, _ = declared(shape)
    config = engine.program
    declaration = registry.declare(model, jnp.bfloat16, parts=parts, axis="tensor")
    found = kept(declaration, GPU.crossovers)
    stepped = dataclasses.replace(
        whole, bind=found.bind, ops=CutOps(None, None, PAGES, GPU.crossovers)
    )
    part = dataclasses.replace(model, num_kv_heads=model.kv_heads(parts) // parts)
    cache = jax.eval_shape(
        lambda: make_cache(part, PAGES, config.page_size, config.max_rows, jnp.dtype(jnp.bfloat16))
    )
    state = jax.eval_shape(lambda: initial_state(config, model.vocab_size))
    function, uploaded = stepping(stepped, engine, kind, size)
    arrays = [uploaded, jax.ShapeDtypeStruct((1, COMM_WORDS), jnp.int32)]
    mesh = compat.abstract_gpus({"data": 1, "tensor": parts})
    # shapes are those of one device, so nothing is left to cut
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
    )
    params = tuple(found.specs.values())
    return compat.lower_for_cuda(mapped, params, cache, *state, *arrays, mesh=mesh)


@pytest.mark.parametrize(
    ("shape", "kind", "size", "peer"),
    [
        ("qwen2.5-0.5b", "decode", 1, True),
        long("llama-3.1-8b", "decode", 64, True),
        ("llama-3.1-8b", "extend", 4096, False),
        long("qwen2.5-0.5b", "extend", 512, True),
        long("llama-3.1-8b", "decode", 1, True),
        long("llama-3.1-8b", "extend", 512, True),
        long("qwen2.5-0.5b", "decode", 64, True),
        long("qwen2.5-0.5b", "extend", 4096, False),
    ],
)
def test_a_cut_model_sums_over_peer_memory(shape, kind, size, peer):
    """Twice a layer, with the norm that follows; in large steps by XLA. The logits are gathered,
    and of a tied model the embeddings summed."""
    text = lowered_cut(shape, kind, size, parts=2)
    assert text.count("call @all_reduce") == 2 * 2
    assert text.count("stablehlo.all_gather") == 1
    sums = text.count("stablehlo.all_reduce") - (shape == "qwen2.5-0.5b")
    assert (sums == 0) == peer


@pytest.mark.parametrize(
    ("kernels", "parts"), [(None, 2), ("xla", 1), long(None, 1), long("xla", 2)]
)
def test_a_tower_uses_the_kernel(kernels, parts):
    """For whole pictures and for windows; on a mesh every device runs all of it."""
    hf, patches = with_tower("qwen2.5-vl-7b"), 4096
    hf["vision_config"] |= {"depth": 4, "fullatt_block_indexes": [1, 3]}
    tower = registry.tower_config_from_hf(hf, registry.config_from_hf(hf))
    declaration = registry.declare_tower(tower, jnp.bfloat16)
    model = pictures.TowerModel(
        lambda arrays: declaration.bind(dict(zip(declaration.specs, arrays, strict=True))),
        declaration.dtype,
        Normal(1 / 255, (0.5,) * 3, (0.5,) * 3),
        functools.partial(range_attention, implementation=kernels),
    )
    about = registry.tower_of(tower.architecture).facts(tower, (), patches)
    arguments = (
        tuple(declaration.specs.values()),
        jax.ShapeDtypeStruct((4096, tower.width), jnp.bfloat16),
        jax.ShapeDtypeStruct((patches, tower.patch_width), jnp.uint8),
        {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in about.items()},
        jax.ShapeDtypeStruct((patches // tower.patches_per_token,), jnp.int32),
    )
    function, mesh = functools.partial(pictures.encode, model), None
    if parts > 1:
        mesh, whole = compat.abstract_gpus({"data": 1, "tensor": parts}), PartitionSpec()
        function = jax.shard_map(
            function, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False
        )
    text = compat.lower_for_cuda(function, *arguments, mesh=mesh)
    assert text.count("call @range_attention") == 4
    assert text.count("custom_call @__gpu$xla.gpu.triton") == (2 if kernels is None else 0)
