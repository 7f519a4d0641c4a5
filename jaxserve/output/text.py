"""One request's output text on the caller's side: growing, held back, cut at the stop."""

from __future__ import annotations

from typing import Any

from jaxserve.request import Request
from jaxserve.text.codec import Codec
from jaxserve.text.detokenize import Detokenizer
from jaxserve.text.stop import held_back
from jaxserve.text.transcript import Transcript


class OutputText:
    """The text of a request, fed with the updates of its tokens.

    Before the end `visible` leaves out what a stop string or regex may still cut away; at the end
    the text is cut as SGLang does: before the matched stop string or token, or behind it with
    `no_stop_trim`.
    """

    def __init__(self, request: Request, codec: Codec) -> None:
        params = request.params
        self._request = request
        options = {
            "skip_special_tokens": params.skip_special_tokens,
            "spaces_between_special_tokens": params.spaces_between_special_tokens,
        }
        self._detokenizer = Detokenizer(codec, request.prompt_ids, **options)
        self._text = ""
        # What a stream may show depends on the special tokens that it does not show.
        self._transcript: Transcript | None = None
        if request.stop_matcher is not None and request.stream_interval:
            self._transcript = Transcript(codec, request.prompt_ids, **options)

    def append(self, new_ids: tuple[int, ...], finish_reason: dict[str, Any] | None) -> None:
        """Takes the tokens of one update and, with the last one, why the request ended."""
        matched = finish_reason.get("matched") if finish_reason else None
        trim = not self._request.params.no_stop_trim
        if isinstance(matched, int) and trim:
            new_ids = new_ids[:-1]
        if new_ids:
            self._text += self._detokenizer.append(new_ids)
        if finish_reason is None:
            if self._transcript is not None:
                for token in new_ids:
                    self._transcript.append(token)
            return
        self._text += self._detokenizer.finish()
        matcher = self._request.stop_matcher
        if isinstance(matched, str) and matcher is not None:
            self._text = self._text[: matcher.start if trim else matcher.end]

    def visible(self, finished: bool) -> str:
        """The text so far, as much of it as may be shown."""
        matcher = self._request.stop_matcher
        if finished or matcher is None or self._transcript is None:
            return self._text
        # A beginning of a stop string may end in either text.
        transcript = self._transcript
        whole, shown = transcript.whole, transcript.shown
        held = held_back(whole.text, matcher.strings, matcher.regexes)
        end = transcript.shown_at(whole.end - held)
        if shown is not whole:
            held = held_back(shown.text, matcher.strings, matcher.regexes)
            end = min(end, shown.end - held)
        return self._text[:end]
