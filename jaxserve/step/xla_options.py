"""With which options of XLA a step program is compiled."""

from __future__ import annotations

from typing import Protocol

from jaxserve.config import ProgramConfig

Options = dict[str, str | bool]


class CompilerOptions(Protocol):
    """XLA's options for a program of a bucket."""

    def __call__(self, bucket: int, /, *, timed: bool = True) -> Options:
        """timed: XLA may time kernels on the device to choose among them."""
        ...


def xla_options(
    config: ProgramConfig, rows: int, *, timed: bool = True, quantized: bool = False
) -> Options:
    """Options for a program that computes `rows` tokens. timed: XLA may time kernels on the device
    to choose among them; else it takes what it has chosen before, or what is likely to be fast.
    quantized: the linear kernels are int8 or float8.

    On a GPU, XLA counts the cache once more for each kernel that updates it in place, finds that
    all this does not fit the device, and recomputes small things over and over to save memory
    (jax 0.11.2: angles and page tables in each layer, and seconds of compile time). The limit that
    it compares with, in per cent of the device's memory, is therefore raised.

    Deterministic inference has no kernels whose result depends on timing, for scatters and
    products, and none chosen by timing them, which may come out differently in every process (all
    versions: 0.10.2 to 0.12).
    """
    if config.platform == "cpu":
        return {}
    options: Options = {"xla_gpu_memory_limit_slop_factor": "10000"}
    crossovers = config.crossovers
    most = crossovers.cublas_rows_quantized if quantized else crossovers.cublas_rows
    if config.deterministic or (most is not None and rows >= most):
        options["xla_gpu_enable_triton_gemm"] = False
    if config.deterministic:
        options["xla_gpu_exclude_nondeterministic_ops"] = True
    if config.deterministic or not timed:
        options["xla_gpu_autotune_level"] = "0"
    return options


def chooses_by_timing(config: ProgramConfig) -> bool:
    """Whether XLA times kernels on the device while it compiles."""
    return config.platform != "cpu" and not config.deterministic
