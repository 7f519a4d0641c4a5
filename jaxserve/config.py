"""User options and the model's facts, resolved once into the sizes everything else uses."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from jaxserve.batch.buckets import CPU_DECODE_ROWS, GPU_DECODE_ROWS, Buckets
from jaxserve.errors import InvalidRequestError
from jaxserve.options import OPTIONS
from jaxserve.scheduler.pace import Pace
from jaxserve.scheduler.policy import Policy

if TYPE_CHECKING:
    from jaxserve.models.config import ModelConfig
    from jaxserve.server_args import ServerArgs

GPU_PAGE, CPU_PAGE = 64, 16
GPU_ROWS, CPU_ROWS = 512, 32
GPU_TOKENS, CPU_TOKENS = 8192, 1024
GPU_TABLES, CPU_TABLES = 64 << 20, 16 << 20
"""Bytes of all page tables; a context that needs more is cut, as by a pool that has fewer pages."""
DISPATCH_SECONDS = 1.2e-3
"""What queueing a program costs the host of a GPU (0.65-1.2 ms)."""
READ_BANDWIDTH = 3.0e12
"""Bytes/s at which a decode step reads the weights (H100)."""
FIXED_GPU, FIXED_CPU = (64, 1024), (32, 256)
"""Rows of the one decode bucket and tokens of the one extend bucket of deterministic inference,
unless the user says: every step costs as much as a full one."""
WIDE_TOP, WIDE_IDS = 1024, 4096
"""Columns of the best logprobs and of named ids in the programs for requests that want more than
max_top_logprobs or max_logprob_ids. They are compiled when first wanted: in every program these
columns would be copied in each step that reports logprobs, and of each prompt token."""
MOST_STEPS = 4
"""In one decode program, unless the user asks for more: tokens arrive that many at a time."""


@dataclasses.dataclass(frozen=True)
class HostMemory:
    """How much host memory is for evicted KV pages: `size` bytes, or where that is 0 `ratio` times
    those of the pool on the device."""

    ratio: float
    size: int

    @property
    def name(self) -> str:
        """The option that decides, and its value."""
        if self.size:
            return f"hicache_size={self.size / 1e9:g} (GB)"
        return f"hicache_ratio={self.ratio:g}"

    def num_bytes(self, device_bytes: int) -> int:
        """Beside a pool of `device_bytes`."""
        return self.size or int(self.ratio * device_bytes)


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of one engine. page_size S; max_rows R: requests that run at once; table_width W:
    pages a row can have (a runner's tables are no wider than its pool); steps_per_dispatch: decode
    steps in one program where possible, 1 to 8 and so never more than S (each row bucket then has
    two decode programs, with one step and with these); deterministic: a request's numbers depend
    on nothing but itself: there is one bucket of each kind, chunks and cached prefixes end at
    multiples of chunk_alignment tokens, and outputs are always decoded; bias_capacity,
    max_logprob_ids, max_top_logprobs: per-request limits of the sparse lists and of top logprobs,
    beyond which a request needs the wide programs."""

    platform: str
    page_size: int
    context_length: int
    table_width: int
    max_rows: int
    buckets: Buckets
    steps_per_dispatch: int
    deterministic: bool
    chunk_alignment: int
    attention: str | None
    kv_cache_dtype: str
    bias_capacity: int
    max_logprob_ids: int
    max_top_logprobs: int
    raw_logprobs: bool
    # what concerns the host only is outside the repr, which names programs
    max_prefill_tokens: int = dataclasses.field(repr=False)
    max_prefill_rows: int | None = dataclasses.field(repr=False)
    max_queued: int | None = dataclasses.field(repr=False)
    overlap: bool = dataclasses.field(repr=False)
    precompile: bool = dataclasses.field(repr=False)
    max_total_tokens: int | None = dataclasses.field(repr=False)
    mem_fraction: float | None = dataclasses.field(repr=False)
    log_interval: int = dataclasses.field(repr=False)
    """Decode steps from one line of the log to the next."""
    policy: Policy = dataclasses.field(repr=False)
    pace: Pace | None = dataclasses.field(repr=False)
    """None: prefill goes first, in whole prompts."""
    radix_eviction: str | None = dataclasses.field(repr=False)
    """Of the prefix cache; None is no prefix cache."""
    host: HostMemory | None = dataclasses.field(repr=False)
    """For pages that leave the device; None: they are forgotten."""
    program_folder: Path | None = dataclasses.field(repr=False)
    """Where whole programs are kept, see step.stored; None is nowhere."""

    @property
    def other_kernels(self) -> str | None:
        """Implementation of everything else: XLA's where attention is, or the default."""
        return "xla" if self.attention == "xla" else None

    def logprob_columns(self, wide: bool) -> tuple[int, int]:
        """Of the best logprobs and of named ids, in the usual programs or in those for more."""
        if not wide:
            return self.max_top_logprobs, self.max_logprob_ids
        return max(self.max_top_logprobs, WIDE_TOP), max(self.max_logprob_ids, WIDE_IDS)

    @classmethod
    def resolve(
        cls, args: ServerArgs, model: ModelConfig, platform: str, weight_bytes: int
    ) -> EngineConfig:
        """Fill in what the user left open. InvalidRequestError names an option that cannot be."""
        gpu = platform != "cpu"
        context = args.context_length or model.context_length
        if context > model.context_length:
            warnings.warn(
                f"context_length={context} is more than the model's {model.context_length} tokens; "
                "what it writes beyond those may make no sense",
                stacklevel=6,  # of Engine's caller
            )
        page_size = args.page_size or (GPU_PAGE if gpu else CPU_PAGE)
        if page_size % 8:
            raise InvalidRequestError(
                f"page_size must be a multiple of 8 (the kernels' tile), got {page_size}"
            )
        decode = GPU_DECODE_ROWS if gpu else CPU_DECODE_ROWS
        if args.cuda_graph_bs:
            decode = tuple(args.cuda_graph_bs)
        if args.cuda_graph_max_bs:
            decode = tuple(b for b in decode if b <= args.cuda_graph_max_bs)
            decode += (args.cuda_graph_max_bs,)
        largest = max(decode)
        default_rows, default_tokens = CPU_ROWS, CPU_TOKENS
        if gpu:
            default_rows, default_tokens = min(largest, GPU_ROWS), GPU_TOKENS
        fixed = args.enable_deterministic_inference
        if fixed:
            default_rows, default_tokens = FIXED_GPU if gpu else FIXED_CPU
        rows = args.max_running_requests or default_rows
        if args.max_total_tokens is not None:
            rows = min(rows, max(args.max_total_tokens // page_size, 1))
        widest = max((GPU_TABLES if gpu else CPU_TABLES) // (4 * (rows + 1)), 1)
        attention = OPTIONS["attention_backend"].effective(args.attention_backend)
        attention = attention or (None if gpu else "xla")
        if not gpu and attention != "xla":
            raise InvalidRequestError(f"attention_backend={attention!r} needs a CUDA device")
        tokens, step_tokens = args.chunked_prefill_size or default_tokens, args.max_prefill_tokens
        pace = None
        if tokens == -1:
            tokens = step_tokens
        elif not fixed:  # whose steps do not depend on who else is running
            pace = Pace.of(model, tokens, gpu, args.enable_mixed_chunk)
        tokens = min(tokens, -(-context // 8) * 8 * rows)
        alignment = 1
        if fixed:
            from pallas_kernels import FIXED_TILE  # imports JAX, as the options must not

            alignment = math.lcm(FIXED_TILE, page_size)
            tokens, step_tokens = (-(-n // alignment) * alignment for n in (tokens, step_tokens))
            buckets = Buckets((rows,), (tokens,))
        else:
            buckets = Buckets.make(rows, tokens, decode)
        default_steps = steps_per_dispatch(weight_bytes) if gpu and not fixed else 1
        steps = args.num_continuous_decode_steps or default_steps
        policy = Policy(
            schedule=args.schedule_policy,
            conservativeness=args.schedule_conservativeness,
            priorities=args.enable_priority_scheduling,
            low_first=args.schedule_low_priority_values_first,
            threshold=args.priority_scheduling_preemption_threshold,
            default_priority=args.default_priority_value,
        )
        folder = cache_folder(args.compilation_cache_dir)
        return cls(
            platform=platform,
            page_size=page_size,
            context_length=context,
            table_width=min(-(-context // page_size), widest),
            max_rows=rows,
            buckets=buckets,
            max_prefill_tokens=step_tokens,
            max_prefill_rows=args.prefill_max_requests,
            max_queued=args.max_queued_requests,
            steps_per_dispatch=steps,
            deterministic=fixed,
            chunk_alignment=alignment,
            overlap=not args.disable_overlap_schedule,
            precompile=gpu if args.precompile is None else args.precompile,
            attention=attention,
            kv_cache_dtype=args.kv_cache_dtype,
            bias_capacity=args.logit_bias_capacity,
            max_logprob_ids=args.max_logprob_ids,
            max_top_logprobs=args.max_top_logprobs,
            raw_logprobs=args.return_original_logprob,
            max_total_tokens=args.max_total_tokens,
            mem_fraction=args.mem_fraction_static,
            log_interval=args.decode_log_interval,
            policy=policy,
            pace=pace,
            radix_eviction=None if args.disable_radix_cache else args.radix_eviction_policy,
            host=_host_memory(args),
            program_folder=Path(folder) / "whole" if gpu and folder else None,
        )


def _host_memory(args: ServerArgs) -> HostMemory | None:
    if not args.enable_hierarchical_cache:
        return None
    return HostMemory(args.hicache_ratio, int(args.hicache_size * 1e9))


def steps_per_dispatch(weight_bytes: int) -> int:
    """Decode steps that a GPU needs in one program so as not to wait for the host, at most
    MOST_STEPS: a step takes at least the time to read the weights."""
    step_seconds = weight_bytes / READ_BANDWIDTH
    enough = (n for n in range(1, MOST_STEPS) if n * step_seconds >= DISPATCH_SECONDS)
    return next(enough, MOST_STEPS)


def cache_folder(option: str | None) -> str:
    """Where compiled programs are kept; "" is nowhere, None the user's cache folder, if they have a
    home."""
    if option is not None:
        return os.path.expanduser(option)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return "" if base.startswith("~") else str(Path(base) / "jaxserve" / "programs")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a single request may ask of the running engine. Of logprobs: up to the first pair the
    usual programs report them, up to the second the wide ones."""

    vocab_size: int
    context_length: int
    max_total_tokens: int
    logit_bias_capacity: int
    max_top_logprobs: int
    max_logprob_ids: int
    most_top_logprobs: int
    most_logprob_ids: int

    @property
    def longest(self) -> int:
        """Tokens of prompt and output together: what the context allows and the pool can hold."""
        return min(self.context_length, self.max_total_tokens)
