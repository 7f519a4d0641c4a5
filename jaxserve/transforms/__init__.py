"""Decoding algorithms that run inside the step: see docs/guide/transforms.md."""

from jaxserve.transforms.automaton import automaton
from jaxserve.transforms.context import Context
from jaxserve.transforms.repetition import dry, no_repeat_ngram
from jaxserve.transforms.scaling import temperature
from jaxserve.transforms.tokens import (
    bad_words,
    exponential_decay_length,
    forced_tokens,
    sequence_bias,
)
from jaxserve.transforms.transform import Transform, chain, joint
from jaxserve.transforms.truncation import (
    epsilon_cutoff,
    eta_cutoff,
    min_p,
    mirostat,
    top_h,
    top_n_sigma,
    typical_p,
    xtc,
)
from jaxserve.transforms.watermark import Detection, detect_watermark, kgw_watermark

__all__ = [
    "Context",
    "Detection",
    "Transform",
    "automaton",
    "bad_words",
    "chain",
    "detect_watermark",
    "dry",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length",
    "forced_tokens",
    "joint",
    "kgw_watermark",
    "min_p",
    "mirostat",
    "no_repeat_ngram",
    "sequence_bias",
    "temperature",
    "top_h",
    "top_n_sigma",
    "typical_p",
    "xtc",
]
