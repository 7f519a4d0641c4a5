"""The tokenizer that belongs to a checkpoint, with its chat template."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters import companions, files
from converters.locate import find_local
from jaxserve.errors import InvalidRequestError, JaxserveError, ModelLoadError, is_panic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MODES = ("auto", "slow")


def load_tokenizer(
    model_path: str,
    *,
    tokenizer_mode: str = "auto",
    revision: str | None = None,
    download_dir: str | None = None,
    chat_template: str | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, a .gguf file or a Hub id.

    tokenizer_mode: "auto" is the fast tokenizer where there is one, "slow" the Python one.
    chat_template: a Jinja template, or the path of a file with one, instead of the checkpoint's.
    Raises ModelLoadError when there is none or it is damaged, InvalidRequestError for a bad mode.
    """
    if tokenizer_mode not in _MODES:
        raise InvalidRequestError(
            f"tokenizer_mode must be one of {', '.join(_MODES)}; got {tokenizer_mode!r}"
        )
    path = find_local(model_path, revision=revision, download_dir=download_dir, weights=False)
    if path.is_dir() and not (path / "tokenizer.json").exists():
        ggufs = files.entries(path, ".gguf")
        if len(ggufs) == 1:
            files.open_inside(path, ggufs[0]).close()
            path = path / ggufs[0]
    try:
        tokenizer = _load(path, use_fast=tokenizer_mode == "auto")
    except JaxserveError:
        raise
    except BaseException as error:
        # transformers and tokenizers raise whatever Python can for bad files, and Rust may panic.
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        reason = " ".join(str(error)[:1000].split()).rstrip(".")
        raise ModelLoadError(
            f"{path}: no usable tokenizer (looked for tokenizer.json or what "
            f"tokenizer_config.json names): {reason}. Give tokenizer_path, or skip_tokenizer_init "
            "and pass input_ids."
        ) from error
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
    return tokenizer


def _transformers() -> Any:
    """The transformers package, without the notice it prints where torch is absent: tokenizers
    are all that we want of it. Imported late: it takes a second, and callers with
    skip_tokenizer_init never need it."""
    variable = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        import transformers
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
    return transformers


def _load(path: Path, *, use_fast: bool) -> PreTrainedTokenizerBase:
    transformers = _transformers()  # quietly, before the imports below do it
    from converters import gguf_tokenizer
    from converters.tokenizer_checks import check_added_tokens, check_growth, check_vocabulary

    if path.suffix == ".gguf":
        return gguf_tokenizer.build_tokenizer(str(path))
    companions.check(path)
    if path.is_dir():
        check_added_tokens(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        str(path), use_fast=use_fast, local_files_only=True
    )
    check_vocabulary(path, tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        check_growth(path, backend)
    return tokenizer


def _read_template(chat_template: str) -> str:
    """A template is Jinja text; anything without Jinja marks is taken as a path."""
    if "{" in chat_template:
        return chat_template
    path = Path(chat_template).expanduser()
    if not path.is_file():
        raise InvalidRequestError(
            f"chat_template={chat_template!r} is neither Jinja text nor an existing file"
        )
    return path.read_text(encoding="utf-8")
