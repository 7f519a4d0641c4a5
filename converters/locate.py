"""From a `model_path` to a local file or folder, and what format it holds."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from converters import files
from converters.companions import COMPANIONS
from converters.messages import plain, some_of
from converters.orbax_format import is_orbax_folder
from converters.sources import INDEX_NAME, SINGLE_NAME, indexed_names
from jaxserve.errors import ModelLoadError, NotSupportedError
from jaxserve.shown import quoted

FORMATS = ("auto", "safetensors", "gguf", "orbax", "dummy")
_UPSTREAM_FORMATS = (
    "pt",
    "npcache",
    "sharded_state",
    "bitsandbytes",
    "mistral",
    "layered",
    "remote",
    "remote_instance",
    "jax",
    "private",
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SMALL_FILES = ("config.json", INDEX_NAME, *COMPANIONS)
_OTHER_WEIGHTS = ("*/*", "consolidated*", "adapter_*")
"""What repositories hold besides: subfolders, the weights in the maker's own layout, adapters."""
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def check_format(load_format: str) -> None:
    """Raises NotSupportedError for a name that is not one of FORMATS."""
    if load_format not in FORMATS:
        known = " exists in SGLang, but" if load_format in _UPSTREAM_FORMATS else ""
        raise NotSupportedError(
            f"load_format={load_format!r}{known} is not supported; use one of {', '.join(FORMATS)}"
        )


def find_local(
    model_path: str, *, revision: str | None, download_dir: str | None, weights: bool
) -> Path:
    """The local file or folder behind `model_path`, downloaded where it is a Hub id.

    weights: False fetches config and tokenizer only; else the shards that the index names, or
    model.safetensors, or the top folder's *.safetensors. Raises ModelLoadError that says what was
    looked for and what to do.
    """
    try:
        path = Path(model_path).expanduser()
        if os.path.lexists(path):
            return path
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, ~nobody, a zero byte
        raise ModelLoadError(f"model_path={quoted(model_path)}: {error}") from error
    # One slash is how a Hub id is written; so is a relative path, hence "looked for" names both.
    if not _HUB_ID.fullmatch(model_path) or path.suffix == ".gguf":
        raise ModelLoadError(
            f"model_path={quoted(model_path)}: no such file or folder (looked for "
            f"{plain(str(path.absolute()))}). "
            "Give a folder with config.json and *.safetensors, a .gguf file, a folder written by "
            "`python -m converters`, or a Hugging Face id like 'owner/name'."
        )
    try:
        folder = _fetch(model_path, revision, download_dir, _SMALL_FILES)
        if weights:
            # of the same commit, whatever was pushed meanwhile
            pinned = folder.parent.name == "snapshots"
            _fetch_weights(model_path, folder.name if pinned else revision, download_dir, folder)
        return folder
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()
        wanted = f" at revision {revision!r}" if revision else ""
        raise ModelLoadError(
            f"model_path={quoted(model_path)}: there is no file or folder "
            f"{plain(str(path.absolute()))}, and as a "
            f"Hugging Face id{wanted} its config.json and weights could not be fetched: "
            f"{reason[0][:300] if reason else type(error).__name__}. Download the model where the "
            "Hub can be reached and give its folder, or correct the path."
        ) from error


def _fetch(
    model_path: str, revision: str | None, download_dir: str | None, patterns: Sequence[str]
) -> Path:
    """patterns: of names in the repository's top folder."""
    return Path(
        huggingface_hub.snapshot_download(
            model_path,
            revision=revision,
            cache_dir=download_dir,
            allow_patterns=list(patterns),
            ignore_patterns=list(_OTHER_WEIGHTS),
        )
    )


def _fetch_weights(
    model_path: str, revision: str | None, download_dir: str | None, folder: Path
) -> None:
    """folder: where the small files are; the weights come into it too."""
    if files.has(folder, INDEX_NAME):
        names = [glob.escape(name) for name in indexed_names(folder)]
        _fetch(model_path, revision, download_dir, names)
        return
    _fetch(model_path, revision, download_dir, [SINGLE_NAME])
    if not files.has(folder, SINGLE_NAME):
        _fetch(model_path, revision, download_dir, ["*.safetensors"])


def detect_format(path: Path, load_format: str) -> tuple[Path, str]:
    """(file or folder to read, format) for a local `path`; checks that they fit.

    "auto" knows a .gguf file, our Orbax folders, folders with *.safetensors, and folders with one
    .gguf file. Raises ModelLoadError; pickles are refused with advice.
    """
    if files.is_file(path):
        if path.suffix != ".gguf":
            raise ModelLoadError(_not_a_model(path))
        if load_format not in ("auto", "gguf", "dummy"):
            raise ModelLoadError(f"load_format={load_format!r}, but {path} is a GGUF file")
        return path, "gguf" if load_format == "auto" else load_format
    if load_format == "dummy":
        return path, "dummy"
    ggufs = files.entries(path, ".gguf")
    has_shards = bool(files.entries(path, ".safetensors")) or files.has(path, INDEX_NAME)
    found = {
        "orbax": is_orbax_folder(path),
        "safetensors": has_shards,
        "gguf": len(ggufs) == 1,
    }
    kind = next((k for k, v in found.items() if v), None) if load_format == "auto" else load_format
    if kind is None or not found[kind]:
        raise ModelLoadError(_nothing_found(path, load_format, ggufs))
    if kind == "gguf":
        files.open_inside(path, ggufs[0]).close()
        return path / ggufs[0], kind
    return path, kind


def _not_a_model(path: Path) -> str:
    if path.suffix in _PICKLES:
        return f"{path} is a pickle, which can run code when it is read. {_CONVERT}"
    if path.suffix == ".safetensors":
        return f"model_path={str(path)!r}: give the folder that also holds its config.json"
    return f"model_path={str(path)!r} is a file, but not a .gguf file"


_CONVERT = (
    "jaxserve reads safetensors, GGUF and its own Orbax folders only: take the safetensors version "
    "of the model, or convert it once with transformers: "
    "AutoModelForCausalLM.from_pretrained(IN).save_pretrained(OUT)."
)


def _nothing_found(path: Path, load_format: str, ggufs: list[str]) -> str:
    what = {
        "safetensors": "*.safetensors",
        "gguf": "one *.gguf",
        "orbax": "weights written by `python -m converters`",
    }
    wanted = what.get(load_format, "*.safetensors, a .gguf file or an Orbax folder of ours")
    names = files.entries(path)
    message = f"{path}: looked for {wanted}, found {some_of(map(plain, names))}. "
    if len(ggufs) > 1:
        return message + f"Give one of the .gguf files as model_path: {some_of(map(plain, ggufs))}."
    if any(name.endswith(_PICKLES) for name in names):
        return message + f"Pickles are never read: they can run code. {_CONVERT}"
    return message + "Is the download complete, and is this the model's folder?"
