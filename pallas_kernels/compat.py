"""Everything that depends on the version of JAX, each with the version and the reason."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax


def triton_backend() -> Any:
    """The module jax.experimental.pallas.triton.

    Deprecated since JAX 0.11.0 (July 2026) and "removed in a future version": its absence is an
    implementation that cannot run, so NotImplementedError.
    """
    try:
        from jax.experimental.pallas import triton
    except ImportError as error:
        raise NotImplementedError(f"JAX {jax.__version__} has no Pallas Triton backend") from error
    return triton


def mosaic_backend() -> Any:
    """The module jax.experimental.pallas.mosaic_gpu; NotImplementedError where it is missing."""
    try:
        from jax.experimental.pallas import mosaic_gpu
    except ImportError as error:
        raise NotImplementedError(f"JAX {jax.__version__} has no Pallas Mosaic GPU") from error
    return mosaic_gpu


def _accept_triton_deprecation() -> None:
    """Hide JAX's notice that the Triton backend is deprecated.

    JAX 0.11 and 0.12 give it at each lowering, which happens after the caller has traced our
    kernel, in the caller's own jit: a filter is the only place left. It matches this one message.
    We know (2026-11): Mosaic kernels stand beside the Triton ones, and Triton still wins decode.
    """
    warnings.filterwarnings(
        "ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning
    )


def _spare_failed_imports() -> None:
    """Let MLIR's bindings find a Python module for the Triton dialect.

    jaxlib ships none (0.10.2 to 0.12.0), and the bindings look for it again at each operation that
    is built: thousands of failed imports a kernel, most of the time that lowering takes. An empty
    module is the same to them, and is found once.
    """
    name = "jaxlib.mlir.dialects.tt"
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        sys.modules[name] = types.ModuleType(name)


def triton_call(
    kernel: Callable[..., None],
    *,
    name: str,
    grid: tuple[int, ...],
    out_shape: Any,
    num_warps: int,
    num_stages: int,
    interpret: bool,
    aliases: dict[int, int] | None = None,
) -> Callable[..., Any]:
    """pl.pallas_call on the Triton backend: naming the parameters' class picks it in every version
    (without, 0.10 means Mosaic and 0.11 means Triton)."""
    from jax.experimental import pallas as pl

    _accept_triton_deprecation()
    _spare_failed_imports()
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=out_shape,
        interpret=interpret,
        input_output_aliases=aliases or {},
        compiler_params=triton_backend().CompilerParams(num_warps=num_warps, num_stages=num_stages),
        name=name,
    )


def mosaic_interpreter() -> Any:
    """What `interpret=` of the Mosaic kernels takes to run on a CPU. NotImplementedError before
    JAX 0.11, whose interpreter lacks `layout_cast`."""
    params = getattr(mosaic_backend(), "InterpretGPUParams", None)
    if params is None:
        raise NotImplementedError(
            f"interpreting Mosaic kernels needs JAX 0.11, this is {jax.__version__}"
        )
    return params()


def mosaic_load(ref: Any, layout: Any) -> Any:
    """What a Mosaic kernel reads of `ref`, in global memory too, in the given layout.

    JAX 0.10 wants an index besides the reference; 0.11 deprecates one, 0.12 has none.
    """
    load = mosaic_backend().load
    index = inspect.signature(load).parameters.get("idx")
    wanted = index is not None and index.default is inspect.Parameter.empty
    return load(ref, *([()] if wanted else []), layout=layout, optimized=False)


def abstract_gpus(
    axes: Mapping[str, int], device_kind: str = "NVIDIA H100 80GB HBM3"
) -> jax.sharding.AbstractMesh:
    """A mesh of GPUs that this machine lacks. axes: sizes by name, none for a single device.

    JAX 0.11 asks the abstract device for its kind when it lowers Pallas kernels; 0.10 has no such
    argument and assumes sm_90.
    """
    device_class = getattr(jax.sharding, "AbstractDevice", None)
    options: dict[str, Any] = {}
    if device_class is not None:
        options["abstract_device"] = device_class(
            device_kind=device_kind, num_cores=None, platform="gpu"
        )
    if axes:
        options["axis_types"] = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes), **options)


def lower_for_cuda(
    function: Callable[..., Any], *shapes: Any, mesh: jax.sharding.AbstractMesh | None = None
) -> str:
    """StableHLO text of `function` lowered for CUDA, on any machine. shapes: arguments as
    jax.ShapeDtypeStruct. mesh: `abstract_gpus`, one if None."""
    with jax.sharding.use_abstract_mesh(mesh or abstract_gpus({})):
        traced = jax.jit(function).trace(*shapes)
        return traced.lower(lowering_platforms=("cuda",)).as_text()
