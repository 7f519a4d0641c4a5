"""The implemented constructor options as fields, with their types and defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(init=False, repr=False, eq=False)
class OptionFields:
    """What a reader of options finds, in normal form. None means "decided by the engine".
    `jaxserve.options.OPTIONS` has each one's range and meaning, under the same name."""

    model_path: str
    tokenizer_path: str | None = None
    tokenizer_mode: str = "auto"
    skip_tokenizer_init: bool = False
    load_format: str = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    context_length: int | None = None
    revision: str | None = None
    download_dir: str | None = None
    json_model_override_args: str | Mapping[str, Any] = "{}"
    trust_remote_code: bool = False
    served_model_name: str | None = None
    chat_template: str | None = None
    weight_version: str = "default"
    preferred_sampling_params: str | Mapping[str, Any] | None = None
    mem_fraction_static: float | None = None
    max_total_tokens: int | None = None
    max_running_requests: int | None = None
    max_queued_requests: int | None = None
    chunked_prefill_size: int | None = None
    enable_mixed_chunk: bool | None = None
    max_prefill_tokens: int = 16384
    prefill_max_requests: int | None = None
    schedule_policy: str = "fcfs"
    schedule_conservativeness: float = 1.0
    enable_priority_scheduling: bool = False
    schedule_low_priority_values_first: bool = False
    priority_scheduling_preemption_threshold: int = 10
    default_priority_value: int | None = None
    abort_on_priority_when_disabled: bool = False
    num_continuous_decode_steps: int | None = None
    enable_deterministic_inference: bool = False
    page_size: int | None = None
    disable_radix_cache: bool = False
    radix_eviction_policy: str = "lru"
    enable_hierarchical_cache: bool = False
    hicache_ratio: float = 2.0
    hicache_size: int = 0
    disable_overlap_schedule: bool = False
    allow_auto_truncate: bool = False
    random_seed: int | None = None
    stream_interval: int = 1
    stream_output: bool = False
    enable_metrics: bool = False
    log_level: str = "info"
    log_requests: bool = False
    log_requests_level: int = 2
    decode_log_interval: int = 40
    device: str | None = None
    attention_backend: str | None = None
    cuda_graph_bs: tuple[int, ...] | None = None
    cuda_graph_max_bs: int | None = None
    tp_size: int = 1
    dp_size: int = 1
    pp_size: int = 1
    ep_size: int = 1
    nnodes: int = 1
    precompile: bool | None = None
    compilation_cache_dir: str | None = None
    return_original_logprob: bool = False
    max_top_logprobs: int = 32
    max_logprob_ids: int = 128
    logit_bias_capacity: int = 1024
