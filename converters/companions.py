"""The small files that go with a model's weights unchanged: the tokenizer's, and what pictures are
prepared by."""

from __future__ import annotations

from pathlib import Path

from converters import files, json_files
from jaxserve.errors import ModelLoadError

COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""Names in a Hugging Face folder, besides config.json."""
MAX_BYTES = 256 << 20
"""Of one file; the largest tokenizer.json of today's models has 35 MB."""
_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_TOKENIZER_CONFIG = "tokenizer_config.json"
_TEMPLATES = "additional_chat_templates"


def check(folder: Path) -> None:
    """For transformers, which opens the folder's files by itself, and follows links and names.

    Raises ModelLoadError unless what it may read are regular files inside the folder, of a size
    that such files have, and tokenizer_config.json is readable and names no others.
    """
    _check_entries(folder)
    if files.has(folder, _TEMPLATES):
        _check_entries(files.subfolder(folder, _TEMPLATES))
    if files.has(folder, _TOKENIZER_CONFIG):
        config = json_files.read(folder, _TOKENIZER_CONFIG)
        try:
            for name in config.list_of("fast_tokenizer_files", str, "file names", ()):
                files.plain_name(name)
        except ModelLoadError as error:
            raise ModelLoadError(f"{config.where}: fast_tokenizer_files: {error}") from None


def _check_entries(folder: Path) -> None:
    for name in files.entries(folder):
        if name.endswith(_SUFFIXES) and not (folder / name).is_dir():
            with files.open_inside(folder, name) as file:
                file.check_size(MAX_BYTES)
