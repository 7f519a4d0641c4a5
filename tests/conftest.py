"""Shared by all tests: where compiled programs are kept, and the warnings that are let through."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import tempfile
from pathlib import Path

import pytest

# read when JAX is imported: tests share compiled programs, and leave the user's cache alone
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "jaxserve-test-programs")
)

# Without these emitters XLA compiles for a CPU in a third of the time (jaxlib 0.11 has no other).
WITHOUT_EMITTERS = "--xla_cpu_use_fusion_emitters=false"
flags = os.environ.get("XLA_FLAGS", "")
if (
    os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1"
    and importlib.metadata.version("jaxlib").startswith("0.10.")
    and WITHOUT_EMITTERS not in flags
):
    os.environ["XLA_FLAGS"] = f"{flags} {WITHOUT_EMITTERS}".strip()

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


@pytest.fixture(scope="session")
def speaking_model(tmp_path_factory):
    """A folder with a tiny model that takes images and text."""
    from tests.vision_models import make_speaking

    return make_speaking(tmp_path_factory.mktemp("speaking"))


@pytest.fixture(scope="module")
def kept_programs():
    """Engines keep whole programs, as those on a GPU do, in one folder for all processes of tests:
    what any of them has traced and compiled, others load. Not for tests that change what is traced,
    or look at how programs come to be."""
    from tests.whole_programs import keep_programs  # imports JAX, which reads what is set above

    with pytest.MonkeyPatch.context() as patch:
        keep_programs(patch, Path(os.environ["JAX_COMPILATION_CACHE_DIR"]) / "whole")
        yield


@pytest.fixture(scope="module")
def optimized():
    """Programs with all of LLVM's passes, which the Makefile leaves out: for tests that run their
    programs for longer than the passes take, or whose bits the passes could change."""
    import jax

    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update(
        "jax_disable_most_optimizations", os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1"
    )


@pytest.fixture(scope="module")
def exact_products():
    """On a GPU float32 products are TF32 by default, too coarse to compare engines. A CPU has one
    precision, and its programs are those of other tests."""
    import jax

    if jax.default_backend() != "gpu":
        yield
        return
    jax.config.update("jax_default_matmul_precision", "highest")
    yield
    jax.config.update("jax_default_matmul_precision", None)
