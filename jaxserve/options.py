"""The engine's implemented constructor options: types, ranges and meanings, in one table.

`ServerArgs` checks its values with it, the command line is built from it, and docs/api.md shows
it. What upstream's releases have is in `jaxserve.api.upstream_options`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from jaxserve.api.option import Option


def _parallel(what: str) -> Option:
    return Option("integer", f"{what}; only 1 is supported yet", low=1)


ONLY_ONE = ("tp_size", "dp_size", "pp_size", "ep_size", "nnodes")
"""Sizes that are implemented for 1 only."""

OPTIONS: Mapping[str, Option] = MappingProxyType(
    {
        # Model and tokenizer.
        "model_path": Option("path", "checkpoint folder, .gguf file or hub id"),
        "tokenizer_path": Option("path", "tokenizer folder; the model's when None", optional=True),
        "tokenizer_mode": Option("text", "auto: the fast tokenizer", choices=("auto", "slow")),
        "skip_tokenizer_init": Option("flag", "tokens in, tokens out: no tokenizer, no text"),
        "load_format": Option(
            "text",
            "checkpoint format; dummy: random weights",
            choices=("auto", "safetensors", "gguf", "orbax", "dummy"),
            known=tuple(
                [
                    "pt",
                    "npcache",
                    "sharded_state",
                    "bitsandbytes",
                    "remote",
                    "layered",
                    "mistral",
                    "presharded",
                    "expert_pack",
                    "flash_rl",
                    "fastsafetensors",
                    "private",
                    "runai_streamer",
                    "remote_instance",
                ]
            ),
        ),
        "dtype": Option(
            "dtype",
            "parameter type; auto: float32 on CPU, bfloat16 on GPU",
            choices=("auto", "half", "float16", "bfloat16", "float", "float32"),
        ),
        "quantization": Option(
            "text",
            "weight-only, of the layers' linear kernels, one scale per output channel: fp8 (e4m3) "
            "or int8; None: as stored",
            optional=True,
            choices=("fp8", "w8a16_int8"),
            known=tuple(
                [
                    "auto-round",
                    "auto-round-int8",
                    "awq",
                    "awq_marlin",
                    "bitsandbytes",
                    "compressed-tensors",
                    "gguf",
                    "gptq",
                    "gptq_marlin",
                    "humming",
                    "marlin",
                    "mlx_q4",
                    "mlx_q8",
                    "modelopt",
                    "modelopt_fp4",
                    "modelopt_fp8",
                    "modelopt_mixed",
                    "modelslim",
                    "moe_wna16",
                    "mxfp4",
                    "mxfp8",
                    "mxfp_w4a8",
                    "nvfp4_online",
                    "petit_nvfp4",
                    "quark",
                    "quark_int4fp8_moe",
                    "quark_mxfp4",
                    "unquant",
                    "w4afp8",
                    "w8a8_fp8",
                    "w8a8_int8",
                ]
            ),
        ),
        "kv_cache_dtype": Option(
            "dtype",
            "type of the KV pages; auto: as dtype; fp8_e4m3: half the bytes, twice the tokens",
            choices=("auto", "bfloat16", "bf16", "fp8_e4m3"),
            known=("fp4_e2m1", "fp4_mx_block16", "fp8_e5m2", "mxfp8", "nvfp4"),
        ),
        "context_length": Option(
            "integer", "most tokens of prompt and output; the model's when None", 2, optional=True
        ),
        "revision": Option("text", "revision of a hub model", optional=True),
        "download_dir": Option("path", "where hub models are stored", optional=True),
        "json_model_override_args": Option("json", "JSON object patched into the model's config"),
        "trust_remote_code": Option("flag", "ignored with a warning: remote code never runs"),
        "served_model_name": Option("text", "name in get_model_info()", optional=True),
        "chat_template": Option("path", "Jinja chat template, or a file of it", optional=True),
        "weight_version": Option("text", "echoed in every result"),
        "preferred_sampling_params": Option(
            "json", "defaults under each request's sampling parameters", optional=True
        ),
        # Memory and scheduling.
        "mem_fraction_static": Option(
            "number", "(weights + KV pages) / device memory", 0.01, 0.99, optional=True
        ),
        "max_total_tokens": Option("integer", "cap on the KV pool, in tokens", 1, optional=True),
        "max_running_requests": Option("integer", "cap on the running batch", 1, optional=True),
        "max_queued_requests": Option("integer", "cap on the waiting queue", 1, optional=True),
        "chunked_prefill_size": Option(
            "integer",
            "most tokens of an extend step, a quarter while a running request streams; None: 8192 "
            "on GPU, 1024 on CPU; -1: prompts go first, in steps of max_prefill_tokens",
            -1,
            optional=True,
        ),
        "enable_mixed_chunk": Option(
            "flag",
            "up to 24 running requests decode within a prompt's step; None: where it is faster",
            optional=True,
        ),
        "max_prefill_tokens": Option("integer", "most tokens in one prefill batch", 1),
        "prefill_max_requests": Option(
            "integer", "most requests in one prefill batch", 1, optional=True
        ),
        "schedule_policy": Option(
            "text",
            "order of the waiting queue; lpm: longest cached prefix first, of the first 128",
            choices=("fcfs", "lpm"),
            known=("dfs-weight", "lof", "random", "priority", "routing-key"),
        ),
        "schedule_conservativeness": Option(
            "number",
            "pages left free for each running request when another is admitted; larger: fewer "
            "retractions",
            0,
        ),
        "enable_priority_scheduling": Option(
            "flag", "requests with a greater priority go first and preempt (with fcfs only)"
        ),
        "schedule_low_priority_values_first": Option("flag", "the least priority goes first"),
        "priority_scheduling_preemption_threshold": Option(
            "integer", "a waiting request preempts those whose priority is worse by more", 0
        ),
        "default_priority_value": Option(
            "integer", "priority of requests without one; None: behind all others", optional=True
        ),
        "abort_on_priority_when_disabled": Option(
            "flag", "refuse requests with a priority when priorities are off"
        ),
        "num_continuous_decode_steps": Option(
            "integer",
            "decode steps in one program; None: 1 on CPU, up to 4 for small models on GPU",
            1,
            8,
            optional=True,
        ),
        "enable_deterministic_inference": Option(
            "flag", "bitwise the same result whatever else runs, ran or is cached; slower"
        ),
        "page_size": Option(
            "integer", "KV tokens per page; None: 64 on GPU, 16 on CPU", 1, optional=True
        ),
        "disable_radix_cache": Option("flag", "keep no prefixes of earlier requests"),
        "radix_eviction_policy": Option(
            "text",
            "which cached prefix goes first: least recently or least often used",
            choices=("lru", "lfu"),
            known=("slru", "priority"),
        ),
        "enable_hierarchical_cache": Option(
            "flag", "cached prefixes that are evicted move to host memory, and come back"
        ),
        "hicache_ratio": Option("number", "that memory / the KV pool's, in bytes", 0.001),
        "hicache_size": Option("integer", "that memory in GB; 0: hicache_ratio decides", 0),
        "disable_overlap_schedule": Option("flag", "wait for each step before the next one"),
        "allow_auto_truncate": Option("flag", "cut prompts that are too long, with a warning"),
        "random_seed": Option(
            "integer", "seeds the requests that bring no seed", 0, (1 << 63) - 1, optional=True
        ),
        # Streaming, observation.
        "stream_interval": Option("integer", "tokens between streamed chunks", 1),
        "stream_output": Option("flag", "streams give deltas instead of the text so far"),
        "enable_metrics": Option(
            "flag", "times of each request in meta_info; engine.metrics for Prometheus"
        ),
        "log_level": Option(
            "level",
            "level of the 'jaxserve' logger, in any case",
            choices=("debug", "info", "warning", "error", "critical"),
        ),
        "log_requests": Option("flag", "log each request, at level info"),
        "log_requests_level": Option(
            "integer", "0: counts; 1: and parameters; 2: and 2,048 characters; 3: and all", 0, 3
        ),
        "decode_log_interval": Option("integer", "decode steps between lines of the log", 1),
        # Device, programs, kernels.
        "device": Option(
            "text",
            "where to run; cuda,cpu: on CUDA if JAX has it; None: what JAX finds",
            optional=True,
            choices=("cpu", "cuda", "cuda,cpu"),
        ),
        "attention_backend": Option(
            "text",
            "kernel implementation; None: best for the device",
            optional=True,
            choices=("xla", "triton", "mosaic_sm90"),
        ),
        "cuda_graph_bs": Option("integers", "the decode batch sizes compiled", optional=True),
        "cuda_graph_max_bs": Option("integer", "largest decode batch compiled", 1, optional=True),
        "tp_size": _parallel("tensor parallel size"),
        "dp_size": _parallel("data parallel size"),
        "pp_size": _parallel("pipeline parallel size"),
        "ep_size": _parallel("expert parallel size"),
        "nnodes": _parallel("number of machines"),
        # jaxserve's own.
        "precompile": Option(
            "flag", "compile every program at start; None: on GPU only", optional=True
        ),
        "compilation_cache_dir": Option(
            "path", "folder of compiled programs; None: the user's cache; '': off", optional=True
        ),
        "return_original_logprob": Option(
            "flag",
            "output logprobs before temperature (by default: what the environment's "
            "SGLANG_RETURN_ORIGINAL_LOGPROB says)",
        ),
        "max_top_logprobs": Option(
            "integer",
            "largest top_logprobs_num of the usual programs; beyond it (to 1,024) others are "
            "compiled when first wanted",
            0,
        ),
        "max_logprob_ids": Option(
            "integer",
            "most ids in token_ids_logprob of the usual programs; beyond it (to 4,096) as above",
            0,
        ),
        "logit_bias_capacity": Option("integer", "most biased and masked ids per request", 1),
    }
)

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "incremental_streaming_output": "stream_output",
        "cuda_graph_bs_decode": "cuda_graph_bs",
        "cuda_graph_max_bs_decode": "cuda_graph_max_bs",
    }
)
"""Second spellings (SGLang renamed these in 2026) -> the name that jaxserve uses."""

FOREIGN_ATTENTION = frozenset(
    [
        "aiter",
        "ascend",
        "compressed",
        "cutedsl_mla",
        "cutlass_mla",
        "dsa",
        "dsv4",
        "dual_chunk_flash_attn",
        "fa3",
        "fa4",
        "flashinfer",
        "flashmla",
        "flex_attention",
        "hpc_ops",
        "intel_amx",
        "intel_xpu",
        "minicpm_flashattn",
        "minicpm_flashinfer",
        "nsa",
        "tbo",
        "tokenspeed_mla",
        "torch_native",
        "trtllm_mha",
        "trtllm_mla",
        "wave",
    ]
)
"""Attention backends of SGLang without a namesake here: accepted with a warning."""

HINTS: Mapping[str, str] = MappingProxyType(
    {
        "tp": "tp_size",
        "tensor_parallel_size": "tp_size",
        "dp": "dp_size",
        "data_parallel_size": "dp_size",
        "model": "model_path",
        "tokenizer": "tokenizer_path",
        "seed": "random_seed",
        "max_model_len": "context_length",
        "gpu_memory_utilization": "mem_fraction_static",
        "max_num_seqs": "max_running_requests",
    }
)
"""What users of other spellings mean; named in the error."""
