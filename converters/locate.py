"""From a `model_path` to a local file or folder, and what format it holds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from converters.orbax_format import is_orbax_folder
from converters.sources import INDEX_NAME
from jaxserve.errors import ModelLoadError, NotSupportedError

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
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer.model")
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

    weights: False fetches config and tokenizer only. Raises ModelLoadError that says what was
    looked for and what to do.
    """
    path = Path(model_path).expanduser()
    if path.exists():
        return path
    # One slash is how a Hub id is written; so is a relative path, hence "looked for" names both.
    if not _HUB_ID.fullmatch(model_path) or path.suffix == ".gguf":
        raise ModelLoadError(
            f"model_path={model_path!r}: no such file or folder (looked for {path.absolute()}). "
            "Give a folder with config.json and *.safetensors, a .gguf file, a folder written by "
            "`python -m converters`, or a Hugging Face id like 'owner/name'."
        )
    patterns = [*_SMALL_FILES, *(["*.safetensors"] if weights else [])]
    try:
        folder = huggingface_hub.snapshot_download(
            model_path, revision=revision, cache_dir=download_dir, allow_patterns=patterns
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()
        wanted = f" at revision {revision!r}" if revision else ""
        raise ModelLoadError(
            f"model_path={model_path!r}: there is no file or folder {path.absolute()}, and as a "
            f"Hugging Face id{wanted} its config.json and weights could not be fetched: "
            f"{reason[0] if reason else type(error).__name__}. Download the model where the Hub "
            "can be reached and give its folder, or correct the path."
        ) from error
    return Path(folder)


def detect_format(path: Path, load_format: str) -> tuple[Path, str]:
    """(file or folder to read, format) for a local `path`; checks that they fit.

    "auto" knows a .gguf file, our Orbax folders, folders with *.safetensors, and folders with one
    .gguf file. Raises ModelLoadError; pickles are refused with advice.
    """
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelLoadError(_not_a_model(path))
        if load_format not in ("auto", "gguf", "dummy"):
            raise ModelLoadError(f"load_format={load_format!r}, but {path} is a GGUF file")
        return path, "gguf" if load_format == "auto" else load_format
    if load_format == "dummy":
        return path, "dummy"
    ggufs = sorted(path.glob("*.gguf"))
    has_shards = any(path.glob("*.safetensors")) or (path / INDEX_NAME).exists()
    found = {
        "orbax": is_orbax_folder(path),
        "safetensors": has_shards,
        "gguf": len(ggufs) == 1,
    }
    kind = next((k for k, v in found.items() if v), None) if load_format == "auto" else load_format
    if kind is None or not found[kind]:
        raise ModelLoadError(_nothing_found(path, load_format, ggufs))
    return (ggufs[0] if kind == "gguf" else path), kind


def _not_a_model(path: Path) -> str:
    if any(path.match(pattern) for pattern in _PICKLES):
        return f"{path} is a pickle, which can run code when it is read. {_CONVERT}"
    if path.suffix == ".safetensors":
        return f"model_path={str(path)!r}: give the folder that also holds its config.json"
    return f"model_path={str(path)!r} is a file, but not a .gguf file"


_CONVERT = (
    "jaxserve reads safetensors, GGUF and its own Orbax folders only: take the safetensors version "
    "of the model, or convert it once with transformers: "
    "AutoModelForCausalLM.from_pretrained(IN).save_pretrained(OUT)."
)


def _nothing_found(path: Path, load_format: str, ggufs: list[Path]) -> str:
    what = {
        "safetensors": "*.safetensors",
        "gguf": "one *.gguf",
        "orbax": "weights written by `python -m converters`",
    }
    wanted = what.get(load_format, "*.safetensors, a .gguf file or an Orbax folder of ours")
    message = f"{path}: looked for {wanted}, found {_listing(sorted(path.iterdir()))}. "
    if len(ggufs) > 1:
        return message + f"Give one of the .gguf files as model_path: {_listing(ggufs)}."
    if any(any(path.glob(pattern)) for pattern in _PICKLES):
        return message + f"Pickles are never read: they can run code. {_CONVERT}"
    return message + "Is the download complete, and is this the model's folder?"


def _listing(paths: Iterable[Path], limit: int = 12) -> str:
    names = [path.name for path in paths]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) + more) or "nothing"
