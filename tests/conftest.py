"""Shared by all tests: where compiled programs are kept, and the warnings that are let through."""

from __future__ import annotations

import os
import signal
import tempfile

import pytest

# read when JAX is imported: tests share compiled programs, and leave the user's cache alone
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "jaxserve-test-programs")
)

# a shell that starts the tests in the background has SIGINT ignored, and so would all children
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """`gpu` tests need a CUDA device; elsewhere they are skipped, visibly."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import jax

    if jax.default_backend() == "gpu":
        return
    for item in gpu:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """`tiny_models(family, **overrides)`: a folder with a tiny random checkpoint, made once."""
    from tests.checkpoints import make_checkpoint

    made: dict[str, str] = {}

    def make(family="llama", **overrides):
        key = f"{family}-{sorted(overrides.items())!r}"
        if key not in made:
            made[key] = make_checkpoint(str(tmp_path_factory.mktemp(family)), family, **overrides)
        return made[key]

    return make


@pytest.fixture(scope="module")
def exact_products():
    """On a GPU float32 products are TF32 by default, too coarse to compare engines."""
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")
    yield
    jax.config.update("jax_default_matmul_precision", None)
