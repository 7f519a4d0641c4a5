"""Result dicts: from a request's updates to what `generate` returns or streams."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from jaxserve.output.extras import View
from jaxserve.output.text import OutputText
from jaxserve.request import Request, Update
from jaxserve.text.codec import Codec


@dataclasses.dataclass(frozen=True, slots=True)
class ResultOptions:
    """What all result dicts of one call have in common.

    codec: None leaves out `text`. deltas: stream chunks hold only what is new. indexed: stream
    chunks carry `index`. The others are the arguments and server options of the same names.
    """

    codec: Codec | None = None
    deltas: bool = False
    indexed: bool = False
    return_text_in_logprobs: bool = False
    return_prompt_token_ids: bool = False
    enable_metrics: bool = False
    weight_version: str = "default"


class Output:
    """Collects one request's updates and makes its result dicts. Every dict has fresh lists."""

    def __init__(self, request: Request, options: ResultOptions) -> None:
        self.request = request
        self.finish_reason: dict[str, Any] | None = None
        self._options = options
        self._text = OutputText(request, options.codec) if options.codec else None
        self._ids: list[int] = []
        self._extras = [(extra, extra.collect()) for extra in request.extras]
        self._unemitted: int | None = None
        # What earlier delta chunks have shown, in characters and tokens.
        self._shown_text = self._shown_ids = 0

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def add(self, update: Update) -> None:
        """Takes the request's next update."""
        self._ids += update.new_ids
        self._unemitted = update.unemitted_id
        for (_, collected), news in zip(self._extras, update.extras, strict=True):
            collected.add(news)
        if self._text is not None:
            self._text.append(update.new_ids, update.finish_reason)
        self.finish_reason = update.finish_reason

    def result(self) -> dict[str, Any]:
        """The request so far, whole; once it has finished, its result."""
        text = None if self._text is None else self._text.visible(self.finished)
        return self._dict(text, 0)

    def chunk(self) -> dict[str, Any]:
        """The next chunk of a stream: the request so far, or what is new of it."""
        if self._options.deltas:
            text = None
            if self._text is not None:
                whole = self._text.visible(self.finished)
                text = whole[self._shown_text :]
                self._shown_text = max(self._shown_text, len(whole))
            chunk = self._dict(text, self._shown_ids)
            self._shown_ids = len(self._ids)
        else:
            chunk = self.result()
        if self._options.indexed:
            chunk["index"] = self.request.index
        return chunk

    def _dict(self, text: str | None, first: int) -> dict[str, Any]:
        """first: the number of the first token that is new."""
        result: dict[str, Any] = {} if text is None else {"text": text}
        result["output_ids"] = self._ids[first:]
        if self._options.return_prompt_token_ids:
            result["prompt_token_ids"] = list(self.request.prompt_ids)
        result["meta_info"] = self._meta_info(first)
        return result

    def _meta_info(self, first: int) -> dict[str, Any]:
        request = self.request
        reason = self.finish_reason
        retractions = request.num_retractions  # may grow meanwhile
        meta: dict[str, Any] = {
            "id": request.rid,
            "finish_reason": None if reason is None else dict(reason),
            "prompt_tokens": len(request.prompt_ids),
            "completion_tokens": len(self._ids),
            "cached_tokens": request.cached_tokens,
            "cached_tokens_details": _cached_details(request),
            "reasoning_tokens": 0,
            "weight_version": self._options.weight_version,
            "num_retractions": retractions,
            "total_retractions": retractions,
            "response_sent_to_client_ts": time.time(),
        }
        if request.media is not None:
            meta["image_tokens"] = request.media.tokens
        if request.dp_rank is not None:
            meta["dp_rank"] = request.dp_rank
        if self._extras:
            view = self._view()
            for extra, collected in self._extras:
                meta |= extra.as_meta(collected, first, view)
        if self.finished:
            end = request.finish_time or time.perf_counter()
            meta["e2e_latency"] = end - request.created
            if self._options.enable_metrics:
                meta |= self._times(end)
        return meta

    def _view(self) -> View:
        ids = self._ids if self._unemitted is None else [*self._ids, self._unemitted]
        texts = self._options.return_text_in_logprobs
        return View(self.request.prompt_ids, ids, self._token_text if texts else None)

    def _token_text(self, token: int) -> str | None:
        codec = self._options.codec
        return None if codec is None else codec.decode([token])

    def _times(self, end: float) -> dict[str, Any]:
        """Moments in seconds since the epoch, durations in seconds, and tokens per second after the
        first one."""
        request = self.request
        epoch = time.time() - time.perf_counter()
        first, admitted = request.first_token_time, request.admitted_time
        submitted = request.submitted_time
        assert submitted is not None
        decoding = end - first if first is not None else 0.0
        rate = (len(self._ids) - 1) / decoding if decoding > 0 and len(self._ids) > 1 else None
        return {
            "request_received_ts": epoch + request.created,
            "api_server_dispatch_finish_ts": epoch + submitted,
            "forward_entry_time": None if admitted is None else epoch + admitted,
            "queue_time": None if admitted is None else admitted - submitted,
            "prefill_finished_time": None if first is None else epoch + first,
            "time_to_first_token": None if first is None else first - request.created,
            "request_finished_ts": epoch + end,
            "decode_throughput": rate,
        }


def _cached_details(request: Request) -> dict[str, int] | None:
    """Where the cached tokens' KV was; None without a host tier."""
    host = request.cached_host_tokens
    return None if host is None else {"device": request.cached_tokens - host, "host": host}
