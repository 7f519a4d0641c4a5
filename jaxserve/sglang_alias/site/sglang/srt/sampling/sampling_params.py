"""`sglang.srt.sampling.sampling_params`."""

from jaxserve.sampling_params import TOP_K_ALL, SamplingParams

__all__ = ["TOP_K_ALL", "SamplingParams"]
