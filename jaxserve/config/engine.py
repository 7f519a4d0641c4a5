"""The sizes and choices of one engine."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

from jaxserve.config import sizes
from jaxserve.config.host_memory import HostMemory
from jaxserve.config.media import MediaSizes, Pictures
from jaxserve.config.program import ProgramConfig
from jaxserve.config.states import States
from jaxserve.scheduler.policy import Policy

if TYPE_CHECKING:
    from jaxserve.machine import DeviceMemory, Machine
    from jaxserve.models.config import ModelConfig
    from jaxserve.options import Options
    from jaxserve.packing.buckets import Buckets
    from jaxserve.scheduler.pace import Pace


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What programs depend on, and what concerns the host only: which programs there are, how
    batches are made, what memory is for what."""

    program: ProgramConfig
    """What changes a compiled program."""
    buckets: Buckets
    """The ladder of shapes: which programs there are. A program knows its own bucket only."""
    states: States
    """What of the model's inside there are programs for, of kinds of their own."""
    max_state_bytes: int
    """Of what a call may ask of that."""
    context_length: int
    """Most tokens of prompt and output together."""
    chunk_alignment: int
    """Chunks and cached prefixes end at multiples of so many tokens."""
    max_prefill_tokens: int
    """Of the prompts that one extend step takes."""
    max_prefill_rows: int | None
    """Prompts in one extend step; None: as many as fit."""
    max_queued: int | None
    """Requests that may wait; None: any number."""
    overlap: bool
    """The next step is dispatched before this one's tokens are read."""
    precompile: bool
    """Programs are compiled before they are wanted: a few before the first request, the others
    while requests run."""
    wait_until_compiled: bool
    """All of them before the first request."""
    max_total_tokens: int | None
    """Cap on the pool, in tokens."""
    num_pages: int | None
    """Of the pool, where another replica has decided it; None: as many as fit."""
    mem_fraction: float | None
    """Of the device's memory, for weights and pages; None: `memory.fraction`."""
    memory: DeviceMemory | None
    """The device's own; None: it shares the host's."""
    log_interval: int
    """Decode steps from one line of the log to the next."""
    policy: Policy
    """Who goes first."""
    pace: Pace | None
    """None: prefill goes first, in whole prompts."""
    radix_eviction: str | None
    """Of the prefix cache; None is no prefix cache."""
    media: MediaSizes | None
    """Of pictures; None: the model takes none."""
    host: HostMemory | None
    """For pages that leave the device; None: they are forgotten."""
    program_folder: Path | None
    """Where whole programs are kept, see step.stored; None is nowhere."""

    @classmethod
    def resolve(
        cls,
        options: Options,
        model: ModelConfig,
        machine: Machine,
        weight_bytes: int,
        pictures: Pictures | None = None,
    ) -> EngineConfig:
        """Fill in what the user left open. pictures: that prompts may show; None: none.
        InvalidRequestError names an option that cannot be."""
        context = sizes.context_length(options, model)
        page = sizes.page_size(options, machine)
        rows = sizes.max_rows(options, machine, page)
        alignment = sizes.chunk_alignment(options, page)
        folder = cache_folder(options.compilation_cache_dir)
        program = ProgramConfig(
            platform=machine.platform,
            crossovers=machine.crossovers,
            page_size=page,
            table_width=sizes.table_width(machine, context, page, rows),
            max_rows=rows,
            steps_per_dispatch=sizes.steps_per_dispatch(options, machine, weight_bytes),
            deterministic=options.enable_deterministic_inference,
            attention=sizes.attention(options, machine),
            kv_cache_dtype=options.kv_cache_dtype,
            bias_capacity=options.logit_bias_capacity,
            max_logprob_ids=options.max_logprob_ids,
            max_top_logprobs=options.max_top_logprobs,
            raw_logprobs=options.return_original_logprob,
        )
        buckets = sizes.buckets(options, machine, context, rows, alignment)
        prefill_tokens = sizes.aligned(options.max_prefill_tokens, alignment)
        media = None
        if pictures is not None:
            step_tokens = min(buckets.max_tokens, prefill_tokens)
            media = MediaSizes.of(pictures, model, context, step_tokens)
        return cls(
            program=program,
            buckets=buckets,
            states=States.of(options, model.num_layers),
            max_state_bytes=options.max_state_bytes,
            context_length=context,
            chunk_alignment=alignment,
            max_prefill_tokens=prefill_tokens,
            max_prefill_rows=options.prefill_max_requests,
            max_queued=options.max_queued_requests,
            overlap=not options.disable_overlap_schedule,
            precompile=machine.is_gpu if options.precompile is None else options.precompile,
            wait_until_compiled=(
                options.wait_until_compiled or options.enable_deterministic_inference
            ),
            max_total_tokens=options.max_total_tokens,
            num_pages=None,
            mem_fraction=options.mem_fraction_static,
            memory=machine.memory,
            log_interval=options.decode_log_interval,
            policy=Policy.of(options),
            pace=sizes.pace(options, machine, model, media),
            radix_eviction=None if options.disable_radix_cache else options.radix_eviction_policy,
            media=media,
            host=HostMemory.of(options),
            program_folder=Path(folder) / "whole" if machine.is_gpu and folder else None,
        )


def cache_folder(option: str | None) -> str:
    """Where compiled programs are kept; "" is nowhere, None the user's cache folder, if they have a
    home."""
    if option is not None:
        return os.path.expanduser(option)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return "" if base.startswith("~") else str(Path(base) / "jaxserve" / "programs")
