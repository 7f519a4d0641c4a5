"""The constructor options that jaxserve implements: one field each, with all that is said of it.

`ServerArgs` is made of this table and checks with it; the command line and the documentation
follow from it. A new option is a field here, and a line where it is read (`jaxserve.config`, say).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jaxserve.options.decoding import DecodingOptions
from jaxserve.options.media import MediaOptions
from jaxserve.options.option import Option, described, option
from jaxserve.options.upstream_values import ATTENTION_BACKENDS, LOAD_FORMATS, QUANTIZATIONS
from jaxserve.sampling_params import SamplingParams


@dataclasses.dataclass(init=False, repr=False, eq=False)
class Options(MediaOptions, DecodingOptions):
    """What a reader of options finds, in normal form. None means "decided by the engine"."""

    # Model and tokenizer.
    model_path: str = option(
        "path", dataclasses.MISSING, "checkpoint folder, .gguf file or hub id", flags=("model",)
    )
    tokenizer_path: str | None = option("path", None, "tokenizer folder; the model's when None")
    tokenizer_mode: str = option(
        "text", "auto", "auto: the fast tokenizer", choices=("auto", "slow")
    )
    skip_tokenizer_init: bool = option(
        "flag", False, "tokens in, tokens out: no tokenizer, no text"
    )
    load_format: str = option(
        "text",
        "auto",
        "checkpoint format; dummy: random weights",
        choices=("auto", "safetensors", "gguf", "orbax", "dummy"),
        known=LOAD_FORMATS,
    )
    dtype: str = option(
        "dtype",
        "auto",
        "parameter type; auto: float32 on CPU, bfloat16 on GPU",
        choices=("auto", "half", "float16", "bfloat16", "float", "float32"),
    )
    quantization: str | None = option(
        "text",
        None,
        "weight-only, of the layers' linear kernels, one scale per output channel: fp8 (e4m3) "
        "or int8; None: as stored",
        choices=("fp8", "w8a16_int8"),
        known=QUANTIZATIONS,
    )
    kv_cache_dtype: str = option(
        "dtype",
        "auto",
        "type of the KV pages; auto: as dtype; fp8_e4m3: half the bytes, twice the tokens",
        choices=("auto", "bfloat16", "bf16", "fp8_e4m3"),
        known=("fp4_e2m1", "fp4_mx_block16", "fp8_e5m2", "mxfp8", "nvfp4"),
    )
    context_length: int | None = option(
        "integer", None, "most tokens of prompt and output; the model's when None", low=2
    )
    revision: str | None = option("text", None, "revision of a hub model")
    download_dir: str | None = option("path", None, "where hub models are stored")
    json_model_override_args: str | Mapping[str, Any] = option(
        "json", "{}", "JSON object patched into the model's config"
    )
    trust_remote_code: bool = option(
        "flag", False, "ignored with a warning: remote code never runs"
    )
    served_model_name: str | None = option("text", None, "name in get_model_info()")
    chat_template: str | None = option("path", None, "Jinja chat template, or a file of it")
    weight_version: str = option("text", "default", "echoed in every result")
    preferred_sampling_params: str | Mapping[str, Any] | None = option(
        "json",
        None,
        "defaults under each request's sampling parameters",
        then=SamplingParams.from_dict,
    )

    # Memory and scheduling.
    mem_fraction_static: float | None = option(
        "number", None, "(weights + KV pages) / device memory", low=0.01, high=0.99
    )
    max_total_tokens: int | None = option("integer", None, "cap on the KV pool, in tokens", low=1)
    max_running_requests: int | None = option("integer", None, "cap on the running batch", low=1)
    max_queued_requests: int | None = option("integer", None, "cap on the waiting queue", low=1)
    chunked_prefill_size: int | None = option(
        "integer",
        None,
        "most tokens of an extend step, a quarter while a running request streams; None: 8192 "
        "on GPU, 1024 on CPU; -1: prompts go first, in steps of max_prefill_tokens",
        low=-1,
    )
    enable_mixed_chunk: bool | None = option(
        "flag",
        None,
        "up to 24 running requests decode within a prompt's step; None: where it is faster",
    )
    max_prefill_tokens: int = option("integer", 16384, "most tokens in one prefill batch", low=1)
    prefill_max_requests: int | None = option(
        "integer", None, "most requests in one prefill batch", low=1
    )
    schedule_policy: str = option(
        "text",
        "fcfs",
        "order of the waiting queue; lpm: longest cached prefix first, of the first 128",
        choices=("fcfs", "lpm"),
        known=("dfs-weight", "lof", "random", "priority", "routing-key"),
    )
    schedule_conservativeness: float = option(
        "number",
        1.0,
        "pages left free for each running request when another is admitted; larger: fewer "
        "retractions",
        low=0,
    )
    enable_priority_scheduling: bool = option(
        "flag", False, "requests with a greater priority go first and preempt (with fcfs only)"
    )
    schedule_low_priority_values_first: bool = option(
        "flag", False, "the least priority goes first"
    )
    priority_scheduling_preemption_threshold: int = option(
        "integer", 10, "a waiting request preempts those whose priority is worse by more", low=0
    )
    default_priority_value: int | None = option(
        "integer", None, "priority of requests without one; None: behind all others"
    )
    abort_on_priority_when_disabled: bool = option(
        "flag", False, "refuse requests with a priority when priorities are off"
    )
    num_continuous_decode_steps: int | None = option(
        "integer",
        None,
        "decode steps in one program; None: 1 on CPU, up to 4 on GPU where steps are short",
        low=1,
        high=8,
    )
    enable_deterministic_inference: bool = option(
        "flag", False, "bitwise the same result whatever else runs, ran or is cached; slower"
    )
    page_size: int | None = option(
        "integer", None, "KV tokens per page; None: 64 on GPU, 16 on CPU", low=1
    )
    disable_radix_cache: bool = option("flag", False, "keep no prefixes of earlier requests")
    radix_eviction_policy: str = option(
        "text",
        "lru",
        "which cached prefix goes first: least recently or least often used",
        choices=("lru", "lfu"),
        known=("slru", "priority"),
    )
    enable_hierarchical_cache: bool = option(
        "flag", False, "cached prefixes that are evicted move to host memory, and come back"
    )
    hicache_ratio: float = option("number", 2.0, "that memory / the KV pool's, in bytes", low=0.001)
    hicache_size: int = option("integer", 0, "that memory in GB; 0: hicache_ratio decides", low=0)
    disable_overlap_schedule: bool = option("flag", False, "wait for each step before the next one")
    allow_auto_truncate: bool = option(
        "flag", False, "cut prompts that are too long, with a warning"
    )
    random_seed: int | None = option(
        "integer", None, "seeds the requests that bring no seed", low=0, high=(1 << 63) - 1
    )

    # Streaming, observation.
    stream_interval: int = option("integer", 1, "tokens between streamed chunks", low=1)
    stream_output: bool = option(
        "flag",
        False,
        "streams give deltas instead of the text so far",
        spellings=("incremental_streaming_output",),
    )
    enable_metrics: bool = option(
        "flag", False, "times of each request in meta_info; engine.metrics for Prometheus"
    )
    log_level: str = option(
        "level",
        "info",
        "level of the 'jaxserve' logger, in any case",
        choices=("debug", "info", "warning", "error", "critical"),
    )
    log_requests: bool = option("flag", False, "log each request, at level info")
    log_requests_level: int = option(
        "integer",
        2,
        "0: counts; 1: and parameters; 2: and 2,048 characters; 3: and all",
        low=0,
        high=3,
    )
    decode_log_interval: int = option("integer", 40, "decode steps between lines of the log", low=1)

    # Device, programs, kernels.
    device: str | None = option(
        "text",
        None,
        "where to run; cuda,cpu: on CUDA if JAX has it; None: what JAX finds",
        choices=("cpu", "cuda", "cuda,cpu"),
    )
    attention_backend: str | None = option(
        "text",
        None,
        "kernel implementation; None: best for the device",
        choices=("xla", "triton", "mosaic_sm90"),
        ignored=ATTENTION_BACKENDS,
    )
    cuda_graph_bs: tuple[int, ...] | None = option(
        "integers",
        None,
        "the decode batch sizes compiled",
        low=1,
        spellings=("cuda_graph_bs_decode",),
    )
    cuda_graph_max_bs: int | None = option(
        "integer",
        None,
        "largest decode batch compiled",
        low=1,
        spellings=("cuda_graph_max_bs_decode",),
    )
    tp_size: int = option(
        "integer",
        1,
        "devices that each layer is cut over (tensor parallel)",
        low=1,
        flags=("tp", "tensor_parallel_size"),
    )
    dp_size: int = option(
        "integer",
        1,
        "replicas of the model, each on tp_size devices (data parallel)",
        low=1,
        flags=("dp", "data_parallel_size"),
    )
    base_gpu_id: int = option("integer", 0, "number of the first device, as JAX lists them", low=0)
    gpu_id_step: int = option("integer", 1, "from one device's number to the next one's", low=1)
    load_balance_method: str = option(
        "text",
        "auto",
        "which replica gets a request; auto: that with the longest cached prefix, unless others "
        "have much less to do; the total_ ones: that with the fewest requests or tokens",
        choices=("auto", "round_robin", "total_requests", "total_tokens"),
        known=("follow_bootstrap_room", "decode_round_robin", "shortest_queue", "minimum_tokens"),
    )
    mesh: Any | None = option(  # noqa: RUF009 (Any may be mutable, a field of the dataclass is not)
        "mesh",
        None,
        "jax.sharding.Mesh with the axes 'data' (replicas) and 'tensor', instead of sizes and "
        "device numbers",
    )
    pp_size: int = option(
        "integer",
        1,
        "pipeline parallel size; only 1 is supported yet",
        low=1,
        only=1,
        flags=("pp", "pipeline_parallel_size"),
    )
    ep_size: int = option(
        "integer",
        1,
        "expert parallel size; only 1 is supported yet",
        low=1,
        only=1,
        flags=("ep", "expert_parallel_size"),
    )
    nnodes: int = option("integer", 1, "number of machines; only 1 is supported yet", low=1, only=1)

    # jaxserve's own.
    precompile: bool | None = option(
        "flag", None, "compile programs before they are wanted; None: on GPU only"
    )
    wait_until_compiled: bool = option(
        "flag",
        False,
        "with precompile: the constructor returns when every program is compiled; False: when a "
        "few can run anything; the others are compiled while requests run",
    )
    compilation_cache_dir: str | None = option(
        "path", None, "folder of compiled programs; None: the user's cache; '': off"
    )
    return_original_logprob: bool = option(
        "flag",
        False,
        "output logprobs before temperature (by default: what the environment's "
        "SGLANG_RETURN_ORIGINAL_LOGPROB says)",
        environment="SGLANG_RETURN_ORIGINAL_LOGPROB",
    )
    max_top_logprobs: int = option(
        "integer",
        32,
        "largest top_logprobs_num of the usual programs; beyond it (to 1,024) others are "
        "compiled when first wanted",
        low=0,
    )
    max_logprob_ids: int = option(
        "integer",
        128,
        "most ids in token_ids_logprob of the usual programs; beyond it (to 4,096) as above",
        low=0,
    )
    logit_bias_capacity: int = option(
        "integer", 1024, "most biased and masked ids per request", low=1
    )

    @property
    def mesh_shape(self) -> tuple[int, int]:
        """Replicas, and devices of each: of `mesh`, or as the sizes say."""
        if self.mesh is None:
            return self.dp_size, self.tp_size
        data, tensor = self.mesh.devices.shape
        return data, tensor


def _own_first(options: Mapping[str, Option]) -> dict[str, Option]:
    """In the order of the documentation; `model_path` is first."""
    return dict(sorted(options.items(), key=lambda item: item[0] not in Options.__annotations__))


OPTIONS: Mapping[str, Option] = MappingProxyType(_own_first(described(Options)))
ALIASES: Mapping[str, str] = MappingProxyType(
    {alias: name for name, option in OPTIONS.items() for alias in option.spellings}
)
"""Second spellings -> the name that jaxserve uses."""
