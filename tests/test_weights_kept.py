"""How parameters lie in memory changes nothing of what a model computes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters.dummy import dummy_params
from converters.placement import placement_for
from jaxserve.models import registry
from jaxserve.models.dense import DenseOps
from jaxserve.parallel.mesh import mesh_of
from jaxserve.weights import arrange
from tests.checkpoints import make_config
from tests.machines import CPU

KERNELS = {"attn.qkv", "attn.o", "mlp.gate_up", "mlp.down"}


@pytest.mark.parametrize(
    ("quantization", "limit", "turned"),
    [
        (None, 0, set()),
        (None, 40_000, KERNELS - {"mlp.gate_up"}),
        (None, 1 << 30, KERNELS),
        ("fp8", 0, KERNELS),
    ],
)
def test_kernels_kept_transposed_compute_the_same(quantization, limit, turned):
    config = registry.config_from_hf(make_config("llama"))
    declaration = registry.declare(config, jnp.dtype("float32"), quantization)
    crossovers = dataclasses.replace(CPU.crossovers, transposed_bytes=limit)
    params = dummy_params(declaration, placement_for(None), 0)
    ids = jnp.arange(9)

    def hidden(model):
        return model(ids, ids, None, None, DenseOps())[0]

    left = dict(params)
    mesh = mesh_of(jax.devices()[0])
    arrays, found = arrange(declaration, left, crossovers, mesh)
    assert not left
    assert [(x.shape, x.dtype) for x in found.abstract(mesh)] == [
        (x.shape, x.dtype) for x in arrays
    ]
    for (path, spec), array in zip(found.specs.items(), arrays, strict=True):
        assert (array.shape, array.dtype) == (spec.shape, spec.dtype)
        name = path.removeprefix("layers.1.").removesuffix(".kernel")
        if path.startswith("layers.1.") and path.endswith(".kernel"):
            axes = (*range(1, array.ndim), 0) if name in turned else range(array.ndim)
            np.testing.assert_array_equal(array, np.transpose(params[path], axes))
    want = hidden(declaration.bind(params))
    np.testing.assert_allclose(hidden(found.bind(arrays)), want, rtol=0, atol=1e-5)
