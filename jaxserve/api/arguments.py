"""The arguments of `generate` beyond the first six, and those that jaxserve does not support."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypedDict

from jaxserve import checks
from jaxserve.errors import InvalidRequestError, NotSupportedError, UnknownOptionError


class GenerateOptions(TypedDict, total=False):
    """Keyword-only arguments of `generate` and `async_generate`. Those without a description are
    not supported yet."""

    stream: bool
    """Return an iterator (async generator) of chunks."""
    rid: str | list[str] | None
    """Request id, or a list of them; made if None. A string with a batch becomes `rid_0`, `rid_1`,
    ..."""
    return_logprob: bool | list[bool]
    """Logprobs in `meta_info`; one flag, or one for each prompt."""
    logprob_start_len: int | list[int] | None
    """First prompt position whose logprob is wanted; None and -1: output only."""
    top_logprobs_num: int | list[int] | None
    """Most likely tokens to report at each position; up to 1,024 (or `max_top_logprobs`), of a
    smaller vocabulary all."""
    token_ids_logprob: list[int] | list[list[int]] | None
    """Token ids whose logprobs to report; a flat list, or a list of lists; up to 4,096 ids (or
    `max_logprob_ids`)."""
    return_raw_logprob: bool | list[bool]
    """`output_token_raw_logprobs` in `meta_info`: logprobs of the drawn tokens before
    penalties, biases, masks, transforms and temperature; one flag, or one for each prompt
    (jaxserve's own)."""
    return_text_in_logprobs: bool
    """Texts as third member of logprob tuples (jaxserve's own)."""
    return_hidden_states: bool | Literal["last"] | list[bool | Literal["last"]]
    """Hidden states in `meta_info`, of all positions or of the "last"; one value, or one for each
    prompt. With `enable_return_hidden_states`."""
    return_logits: bool | Literal["last"] | list[bool | Literal["last"]]
    """Logits of output tokens in `meta_info`, likewise (jaxserve's own). With
    `enable_return_logits`."""
    return_prompt_token_ids: bool
    """Adds `prompt_token_ids` to results (jaxserve's own)."""
    progress: bool
    """A progress bar over the requests (jaxserve's own; not with `stream`)."""
    priority: int | None
    """Of all prompts of the call, with `enable_priority_scheduling`."""
    cache_salt: str | list[str] | None
    """One salt, or one for each prompt: cached prefixes are shared only where it is the same."""
    routed_dp_rank: int | None
    """The replica that is to run all prompts of the call, in [0, dp_size); None: the engine
    decides (`load_balance_method`)."""
    data_parallel_rank: int | None
    """The same, as SGLang called it earlier."""
    custom_logit_processor: Any
    """A `CustomLogitProcessor`, its class, or its `to_str()` (with
    `enable_custom_logit_processor`); one, or one for each prompt."""
    external_trace_header: dict[str, Any] | None
    """Accepted without effect: there is no tracing."""
    routed_experts_start_len: int
    """Accepted without effect: there is no record of experts."""

    mm_hashes: None
    mm_content_hashes: None
    lora_path: None
    require_reasoning: bool
    return_routed_experts: bool
    session_params: None
    session_id: None
    bootstrap_host: None
    bootstrap_port: None
    bootstrap_room: None
    disagg_prefill_dp_rank: None


NO_EFFECT = frozenset({"external_trace_header", "routed_experts_start_len"})
"""Accepted, and without effect as long as what they refer to is not there: tracing, expert
records."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """The supported arguments of one call, as given: see `GenerateOptions`, `Engine.generate`."""

    prompt: Any = None
    sampling_params: Any = None
    input_ids: Any = None
    image_data: Any = None
    return_logprob: Any = False
    logprob_start_len: Any = None
    top_logprobs_num: Any = None
    token_ids_logprob: Any = None
    return_raw_logprob: Any = False
    return_hidden_states: Any = False
    return_logits: Any = False
    rid: Any = None
    priority: Any = None
    cache_salt: Any = None
    routed_dp_rank: Any = None
    data_parallel_rank: Any = None
    custom_logit_processor: Any = None
    stream: bool = False
    return_text_in_logprobs: bool = False
    return_prompt_token_ids: bool = False
    progress: bool = False

    @classmethod
    def collect(cls, media: Mapping[str, Any], **given: Any) -> Arguments:
        """Sorts the arguments of a call. Raises UnknownOptionError (a TypeError) for a name that
        does not exist and NotSupportedError for one that is given but not supported yet."""
        known = GenerateOptions.__annotations__
        values = {}
        for name, value in given.items():
            if name not in SUPPORTED and name not in known:
                raise UnknownOptionError(
                    f"generate() has no argument {checks.quoted(name)}"
                    f"{checks.near_matches(name, known)}"
                )
            if name in SUPPORTED:
                values[name] = value
            elif name not in NO_EFFECT:
                _refuse(name, value)
        values["image_data"] = media["image_data"]
        for name in ("audio_data", "video_data"):
            _refuse(name, media[name])
        for name in ("stream", "return_text_in_logprobs", "return_prompt_token_ids", "progress"):
            if name in values:
                # Upstream takes None for False in these places.
                value = values[name]
                values[name] = value is not None and checks.boolean(name, value)
        if values.get("progress") and values.get("stream"):
            raise InvalidRequestError("progress=True shows a bar for calls without stream=True")
        return cls(**values)


SUPPORTED = frozenset(field.name for field in dataclasses.fields(Arguments))


def _refuse(name: str, value: Any) -> None:
    """None, False, what is empty and lists of such are how callers leave an argument out."""
    if value is not None and not checks.absent(value):
        raise NotSupportedError(
            f"argument {name!r} of generate is not supported yet, got {checks.shown(value)}"
        )
