"""Tokenizer files that would cost more than a tokenizer may: refused before or after loading.

A tokenizer.json is a program of replacements. What it makes of one character is bounded here from
its parts alone; a chain of six that write a hundred characters for one would make 10**12.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxserve.errors import ModelLoadError

MOST_GROWTH = 1 << 10
"""Characters that one part of a tokenizer (normalizer, pre-tokenizer, post-processor, decoder) may
make of one. Unicode's NFKC makes 18 of one, bytes written as characters 4."""
MOST_FIXED = 1 << 16
"""Characters or tokens that a part may add to each text."""
MOST_ADDED = 1 << 17
"""Added tokens; so many load in ten seconds. Text models have up to some thousands (Gemma 6,400),
those that speak in codes of sounds or images up to 65,536 and a few."""
MOST_NAMED = 1 << 12
"""Further special tokens that a config names. transformers' time goes with the square of their
number: these take a tenth of a second, 100,000 a minute. Models have up to some hundreds."""
GROWING = {
    "NFC": 3,
    "NFD": 4,
    "NFKC": 18,
    "NFKD": 18,
    "Lowercase": 3,
    "ByteLevel": 4,
    "BertNormalizer": 36,
    "Metaspace": 2,
}
"""Characters of one at most, by Unicode's tables and UTF-8; a prefix for each piece."""
Growth = tuple[int, int]
"""How many characters or tokens one of them becomes, and how many are added to a text."""


def check_added_tokens(folder: Path) -> None:
    """Raises ModelLoadError if the files of a folder add or name too many tokens. What is no JSON
    is left to the loader."""
    path = folder / "tokenizer.json"
    if path.is_file():
        data = path.read_bytes()
        # Each added token is an object, so most files need no look at their structure.
        if data.count(b"{") > MOST_ADDED:
            _check_count(path, "added_tokens", _json(data), MOST_ADDED)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if path.is_file():
            config = _json(path.read_bytes())
            _check_count(path, "added_tokens_decoder", config, MOST_ADDED)
            _check_count(path, "extra_special_tokens", config, MOST_NAMED)
            _check_count(path, "additional_special_tokens", config, MOST_NAMED)


def check_count(where: str, count: int, most: int = MOST_ADDED) -> None:
    """Raises ModelLoadError if a file adds more tokens than `most`."""
    if count > most:
        raise ModelLoadError(f"{where} has {count} tokens; at most {most} are taken")


def check_vocabulary(path: Path, tokenizer: Any) -> None:
    """Raises ModelLoadError for a transformers tokenizer that knows nothing but its special tokens:
    some classes make one where all their files are missing."""
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    if not set(tokenizer.get_vocab()) - special:
        raise ModelLoadError(
            f"{path}: the tokenizer ({type(tokenizer).__name__}) has no vocabulary but "
            f"{len(special)} special tokens: its tokenizer.json, or whatever it was made of, is "
            "missing. Give tokenizer_path, or skip_tokenizer_init and pass input_ids"
        )


def check_growth(path: Path, backend: Any) -> None:
    """Raises ModelLoadError if a part of a tokenizers.Tokenizer may grow text without bound."""
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        part = getattr(backend, name)
        if part is None:
            continue
        factor, fixed = _growth(json.loads(part.__getstate__()))
        if factor > MOST_GROWTH or fixed > MOST_FIXED:
            raise ModelLoadError(
                f"{path}: the tokenizer's {name} may make {_shown(factor)} characters or tokens of "
                f"one, and add {_shown(fixed)} to each text; at most {MOST_GROWTH} and "
                f"{MOST_FIXED} are taken"
            )


def _growth(part: dict[str, Any]) -> Growth:
    kind = part.get("type", "")
    rule = _RULES.get(kind)
    return (GROWING.get(kind, 1), 0) if rule is None else rule(part)


def _sequence(part: dict[str, Any]) -> Growth:
    """One after the other: what is added early grows later."""
    factor, fixed = 1, 0
    lists = ("normalizers", "pretokenizers", "processors", "decoders")
    for inner in next((part[name] for name in lists if name in part), []):
        more, added = _growth(inner)
        factor, fixed = factor * more, fixed * more + added
    return factor, fixed


def _replace(part: dict[str, Any]) -> Growth:
    content = len(part.get("content", ""))
    text = part.get("pattern", {}).get("String")
    if text:
        return max(1, math.ceil(content / len(text))), 0
    return 1 + content, 0  # an expression may match before every character


def _precompiled(part: dict[str, Any]) -> Growth:
    """SentencePiece's table: the size of a trie, the trie, then texts that end with a zero byte."""
    table = base64.b64decode(part.get("precompiled_charsmap") or "")
    texts = table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")
    return max(1, *map(len, texts)), 0


def _template(part: dict[str, Any]) -> Growth:
    pieces = part.get("single", [])
    specials = part.get("special_tokens", {})
    ids = [piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece]
    added = sum(len(specials.get(name, {}).get("ids", ())) for name in ids)
    return max(1, len(pieces) - len(ids)), added


_RULES: dict[str, Callable[[dict[str, Any]], Growth]] = {
    "Sequence": _sequence,
    "Replace": _replace,
    "Prepend": lambda part: (1, len(part.get("prepend", ""))),
    "Precompiled": _precompiled,
    "TemplateProcessing": _template,
}


def _check_count(path: Path, key: str, config: Any, most: int) -> None:
    values = config.get(key) if isinstance(config, dict) else None
    if isinstance(values, list | dict):
        check_count(f"{path}: {key}", len(values), most)


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _shown(number: int) -> str:
    return str(number) if number < 10**9 else f"10**{int(math.log10(number))}"
