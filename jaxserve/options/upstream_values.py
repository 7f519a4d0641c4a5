"""Values of SGLang's options that jaxserve knows by name and has no implementation for."""

from __future__ import annotations

LOAD_FORMATS = (
    "pt", "npcache", "sharded_state", "bitsandbytes", "remote", "layered", "mistral", "presharded",
    "expert_pack", "flash_rl", "fastsafetensors", "private", "runai_streamer", "remote_instance",
)  # fmt: skip

QUANTIZATIONS = (
    "auto-round", "auto-round-int8", "awq", "awq_marlin", "bitsandbytes", "compressed-tensors",
    "gguf", "gptq", "gptq_marlin", "humming", "marlin", "mlx_q4", "mlx_q8", "modelopt",
    "modelopt_fp4", "modelopt_fp8", "modelopt_mixed", "modelslim", "moe_wna16", "mxfp4", "mxfp8",
    "mxfp_w4a8", "nvfp4_online", "petit_nvfp4", "quark", "quark_int4fp8_moe", "quark_mxfp4",
    "unquant", "w4afp8", "w8a8_fp8", "w8a8_int8",
)  # fmt: skip

ATTENTION_BACKENDS = (
    "aiter", "ascend", "compressed", "cutedsl_mla", "cutlass_mla", "dsa", "dsv4",
    "dual_chunk_flash_attn", "fa3", "fa4", "flashinfer", "flashmla", "flex_attention", "hpc_ops",
    "intel_amx", "intel_xpu", "minicpm_flashattn", "minicpm_flashinfer", "nsa", "tbo",
    "tokenspeed_mla", "torch_native", "trtllm_mha", "trtllm_mla", "wave",
)  # fmt: skip
"""Kernels without a namesake here: accepted with a warning, since they change no result."""
