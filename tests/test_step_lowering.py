"""The whole steps, with the kernels of a Hopper GPU, lowered for CUDA on this machine."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from benchmarks.workloads import SHAPES
from jaxserve.attention.paged import PagedOps
from jaxserve.cache.pool import make_cache
from jaxserve.config import EngineConfig
from jaxserve.models import registry
from jaxserve.packing.buckets import Buckets
from jaxserve.packing.layout import ExtendLayout
from jaxserve.sampler.sampler import Sampler
from jaxserve.server_args import ServerArgs
from jaxserve.step import products, step
from jaxserve.step.payloads import USUAL
from jaxserve.step.state import initial_state
from pallas_kernels import Device, compat
from tests.kernels.support import quiet
from tests.machines import GPU

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


def lowered(monkeypatch, shape, kind, size, *, quantization=None, kv="bfloat16", steps=1):
    """StableHLO of the program `kind` of bucket `size`, two layers of a real shape."""
    monkeypatch.setattr("pallas_kernels.registry.current_device", lambda: H100)
    model, engine, stepped, params = declared(shape, quantization)
    config = engine.program
    cache = jax.eval_shape(
        lambda: make_cache(model, PAGES, config.page_size, config.max_rows, jnp.dtype(kv))
    )
    state = jax.eval_shape(lambda: initial_state(config, model.vocab_size))
    if kind == "decode":
        function = functools.partial(step.decode_steps, stepped, steps)
        upload = (2, size)
    else:
        layout = ExtendLayout(size, engine.buckets.extend_rows(size), config.table_width)
        function, upload = functools.partial(step.extend_step, stepped, layout), (layout.size,)
    uploaded = jax.ShapeDtypeStruct(upload, jnp.int32)
    return compat.lower_for_cuda(function, params, cache, *state, uploaded)


@pytest.mark.parametrize("shape", ["llama-3.1-8b", "qwen2.5-0.5b", "qwen3-0.6b"])
@pytest.mark.parametrize(("kind", "size"), [("decode", 1), ("decode", 256), ("extend", 512)])
def test_steps_use_the_kernels(monkeypatch, shape, kind, size):
    text = lowered(monkeypatch, shape, kind, size)
    for kernel in ("rope_kv_write", "paged_decode" if kind == "decode" else "mosaic_gpu", "sample"):
        assert kernel in text
    assert ("@add_norm" in text) == (size > 1)


@pytest.mark.parametrize("quantization", ["fp8", "w8a16_int8"])
def test_quantized_steps_lower(monkeypatch, quantization):
    text = lowered(
        monkeypatch, "llama-3.1-8b", "decode", 8, quantization=quantization, kv="float8_e4m3fn"
    )
    assert "paged_decode" in text


@pytest.mark.parametrize("shape", ["llama-3.1-8b", "qwen2.5-0.5b", "qwen3-0.6b"])
@pytest.mark.parametrize("size", [1, 256])
def test_several_decode_steps_lower_as_one_program(monkeypatch, shape, size):
    """The same kernels, in a loop."""
    single = lowered(monkeypatch, shape, "decode", size)
    several = lowered(monkeypatch, shape, "decode", size, steps=4)
    for kernel in ("rope_kv_write", "paged_decode", "sample"):
        assert several.count(f"func.func private @{kernel}") > 0
        assert several.count(kernel) >= single.count(kernel)
    assert several.count("stablehlo.while") == single.count("stablehlo.while") + 1
    assert f"tensor<4x{size}xi32>" in several


def test_several_steps_of_a_quantized_model_lower(monkeypatch):
    text = lowered(
        monkeypatch, "llama-3.1-8b", "decode", 8, quantization="fp8", kv="float8_e4m3fn", steps=4
    )
    assert "paged_decode" in text


@pytest.mark.parametrize("shape", ["llama-3.1-8b", "qwen2.5-0.5b"])
@pytest.mark.parametrize(("kind", "size"), [("decode", 8), ("decode", 64), ("extend", 64)])
def test_the_products_alone_are_those_of_the_steps(monkeypatch, shape, kind, size):
    """Else XLA would not have chosen their kernels when a step is compiled beside requests."""
    step_text = lowered(monkeypatch, shape, kind, size)
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
