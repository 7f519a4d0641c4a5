"""Options of what requests may do beside sampling, a part of the table (`options/table.py`)."""

from __future__ import annotations

import dataclasses

from jaxserve.options.option import option


@dataclasses.dataclass(init=False, repr=False, eq=False)
class DecodingOptions:
    """In normal form, as `Options`, which has them behind its own."""

    # The model's inside.
    enable_return_hidden_states: bool = option(
        "flag", False, "requests may ask for hidden states (`return_hidden_states`)"
    )
    return_hidden_states_mode: str | None = option(
        "text",
        None,
        "full: as enable_return_hidden_states; last: of the last position only",
        choices=("last", "full"),
    )
    hidden_state_layers: tuple[int, ...] | None = option(
        "integers",
        None,
        "inner layers whose hidden states are returned too; 0: the embeddings, -1: the final "
        "norm's output (with hidden states only)",
    )
    enable_return_logits: bool = option(
        "flag", False, "requests may ask for logits (`return_logits`)"
    )
    max_state_bytes: int = option(
        "integer",
        1 << 32,
        "most bytes of hidden states and logits that a call may ask for",
        low=0,
        high=1 << 62,
    )

    # What decides about tokens.
    enable_custom_logit_processor: bool = option(
        "flag", False, "take logit processors that are strings, and run what those say"
    )

    # Grammars.
    grammar_backend: str | None = option(
        "text",
        None,
        "what knows json_schema, regex, ebnf and structural_tag; None: llguidance, loaded when it "
        "is first wanted; llguidance: loaded at the start; none: nothing does",
        choices=("llguidance", "none"),
        ignored=("outlines", "xgrammar"),
    )
    grammar_timeout: float = option(
        "number", 10.0, "seconds that a call waits for each of its grammars", low=0.001, high=86_400
    )
    constrained_json_disable_any_whitespace: bool = option(
        "flag", False, "JSON of schemas as json.dumps writes it, not with whitespace anywhere"
    )
    constrained_json_whitespace_pattern: str | None = option(
        "text", None, "regular expression of the whitespace that JSON of schemas may have"
    )
