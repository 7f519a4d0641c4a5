"""A tokenizer from a GGUF file's metadata alone. transformers' own way there needs torch."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from converters.gguf_config import special_id
from converters.gguf_pretokenizers import splitting
from converters.gguf_reader import GGUFFile
from converters.tokenizer_checks import check_count
from jaxserve.errors import ModelLoadError, NotSupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SPACE = "\u2581"
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_ROLES = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}


def build_tokenizer(path: str, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file, with its chat template.

    chat_template: Jinja text to use instead of the file's. Kinds: byte-level BPE
    (tokenizer.ggml.model "gpt2") and SentencePiece BPE ("llama").

    Raises ModelLoadError (missing or damaged file, keys that are missing or do not fit each other)
    and NotSupportedError (another kind of vocabulary or pre-tokenizer).
    """
    file = GGUFFile.open(path)
    kind = file.string("tokenizer.ggml.model")
    tokens = _tokens(file)
    if kind == "gpt2":
        backend, add_bos = _byte_level(file, tokens)
    elif kind == "llama":
        backend, add_bos = _sentencepiece(file, tokens), True
    else:
        raise NotSupportedError(
            f"{path}: tokenizer.ggml.model={kind!r} is not supported; supported: gpt2 (byte-level "
            "BPE), llama (SentencePiece BPE)"
        )
    _add_tokens(file, backend, tokens)
    ids = {role: special_id(file, name) for role, name in _ROLES.items()}
    roles = {role: None if i is None else tokens[i] for role, i in ids.items()}
    ends = {
        "bos": file.flag("tokenizer.ggml.add_bos_token", add_bos),
        "eos": file.flag("tokenizer.ggml.add_eos_token", False),
    }
    for name, added in ends.items():
        if added and ids[f"{name}_token"] is None:
            raise ModelLoadError(
                f"{path}: the tokenizer adds {name.upper()}, but tokenizer.ggml.{name}_token_id "
                "is missing"
            )
    backend.post_processor = _template(
        roles["bos_token"] if ends["bos"] else None,
        roles["eos_token"] if ends["eos"] else None,
        ids,
    )
    return _fast_tokenizer_class()(
        tokenizer_object=backend,
        add_bos_token=ends["bos"],
        add_eos_token=ends["eos"],
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=_chat_template(file) if chat_template is None else chat_template,
        **roles,
    )


def _tokens(file: GGUFFile) -> list[str]:
    """By id. Raises ModelLoadError for repetitions: an id would have no token."""
    tokens = file.strings("tokenizer.ggml.tokens")
    ids: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if ids.setdefault(token, i) != i:
            raise ModelLoadError(
                f"{file.path}: tokenizer.ggml.tokens has {token!r} at both {ids[token]} and {i}"
            )
    return tokens


def _token_types(file: GGUFFile, tokens: list[str]) -> list[int]:
    types = file.numbers("tokenizer.ggml.token_type", None)
    if types is None:
        return [_NORMAL] * len(tokens)
    _check_length(file, "token_type", len(types), len(tokens))
    return [int(kind) for kind in types]


def _check_length(file: GGUFFile, what: str, length: int, expected: int) -> None:
    if length != expected:
        raise ModelLoadError(
            f"{file.path}: tokenizer.ggml.{what} has {length} entries for {expected} tokens"
        )


def _byte_level(file: GGUFFile, tokens: list[str]) -> tuple[Tokenizer, bool]:
    """GPT-2's kind: text to bytes to printable characters. Also whether BOS is added by default."""
    family = splitting(file.string("tokenizer.ggml.pre"), file.path)
    backend = _tokenizer(file, tokens, _merges(file), ignore_merges=family.whole_words)
    if normalizer := family.normalizer():
        backend.normalizer = normalizer
    prefix_space = file.flag("tokenizer.ggml.add_space_prefix", False)
    backend.pre_tokenizer = family.pre_tokenizer(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    return backend, family.add_bos


def _sentencepiece(file: GGUFFile, tokens: list[str]) -> Tokenizer:
    """SentencePiece BPE, as the tokenizer.json files of Llama 2 and Mistral state it: spaces are
    written U+2581, one is put before each stretch of text, unknown characters become bytes."""
    given = "tokenizer.ggml.merges" in file.metadata
    merges = _merges(file) if given else _merges_from_scores(file, tokens)
    unknown = special_id(file, "unknown")
    backend = _tokenizer(
        file,
        tokens,
        merges,
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    prefix_space = file.flag("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", _SPACE)
    start = [normalizers.Prepend(_SPACE)] if prefix_space else []
    backend.normalizer = normalizers.Sequence([*start, spaces])
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix_space:
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    backend.decoder = decoders.Sequence(steps)
    return backend


def _tokenizer(
    file: GGUFFile, tokens: list[str], merges: list[tuple[str, str]], **options: Any
) -> Tokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        return Tokenizer(BPE(vocab, merges, **options))
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise ModelLoadError(
            f"{file.path}: tokenizer.ggml.merges do not fit tokenizer.ggml.tokens: {error}"
        ) from error


def _merges(file: GGUFFile) -> list[tuple[str, str]]:
    pairs = [tuple(merge.split(" ")) for merge in file.strings("tokenizer.ggml.merges")]
    for pair in pairs:
        if len(pair) != 2:
            raise ModelLoadError(
                f"{file.path}: tokenizer.ggml.merges has {' '.join(pair)!r}, which is not two "
                "tokens with a space between"
            )
    return pairs


def _merges_from_scores(file: GGUFFile, tokens: list[str]) -> list[tuple[str, str]]:
    """SentencePiece merges the pair that makes the best-scored token: every way to cut a token into
    two others is a merge, the best score first. Only normal tokens are made by merging."""
    scores = file.numbers("tokenizer.ggml.scores")
    _check_length(file, "scores", len(scores), len(tokens))
    ids = {token: i for i, token in enumerate(tokens)}
    types = _token_types(file, tokens)
    normal = [i for i in range(len(tokens)) if types[i] == _NORMAL]
    merges: list[tuple[str, str]] = []
    for i in sorted(normal, key=lambda i: (-scores[i], i)):
        token = tokens[i]
        cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [pair for pair in cuts if pair[0] in ids and pair[1] in ids]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def _add_tokens(file: GGUFFile, backend: Tokenizer, tokens: list[str]) -> None:
    """Control tokens and the user's are found whole in the text, before anything else happens to
    it; decoding can skip control tokens only."""
    added = [
        AddedToken(token, normalized=False, special=kind == _CONTROL)
        for token, kind in zip(tokens, _token_types(file, tokens), strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    check_count(f"{file.path}: tokenizer.ggml.token_type, control and user-defined,", len(added))
    backend.add_tokens(added)


def _template(bos: str | None, eos: str | None, ids: dict[str, int | None]) -> TemplateProcessing:
    one, two = ["$A:0"], ["$B:1"]
    if bos is not None:
        one, two = [f"{bos}:0", *one], [f"{bos}:1", *two]
    if eos is not None:
        one, two = [*one, f"{eos}:0"], [*two, f"{eos}:1"]
    specials = [(bos, ids["bos_token"]), (eos, ids["eos_token"])]
    return TemplateProcessing(
        single=one,
        pair=one + two,
        special_tokens=[(token, i) for token, i in specials if token is not None],
    )


def _chat_template(file: GGUFFile) -> str | dict[str, str] | None:
    """The file's template; a dict by name when it has several, "default" among them."""
    default = file.string("tokenizer.chat_template", None)
    names = file.strings("tokenizer.chat_templates", None)
    if not names:
        return default
    named = {name: file.string(f"tokenizer.chat_template.{name}") for name in names}
    return named if default is None else {"default": default} | named


def _fast_tokenizer_class() -> type[PreTrainedTokenizerFast]:
    """Imported late: it takes a second. Without torch, transformers says on import that models
    are not available; nobody asked it for any."""
    root = logging.getLogger("transformers")

    def is_other_message(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    root.addFilter(is_other_message)
    try:
        from transformers import PreTrainedTokenizerFast
    finally:
        root.removeFilter(is_other_message)
    return PreTrainedTokenizerFast
