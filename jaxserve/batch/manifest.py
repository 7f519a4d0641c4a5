"""The manifest of an output folder: which job it belongs to."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from jaxserve import checks
from jaxserve.batch.columns import Asking
from jaxserve.batch.folder import Folder, read_json
from jaxserve.batch.inputs import Input, InputFile
from jaxserve.errors import InvalidRequestError
from jaxserve.server_args import ServerArgs

VERSION = 1
"""Of the manifest's form."""
DECIDING = (
    *("model_path", "tokenizer_path", "tokenizer_mode", "revision", "load_format", "dtype"),
    *("quantization", "kv_cache_dtype", "context_length", "json_model_override_args"),
    *("chat_template", "skip_tokenizer_init", "preferred_sampling_params", "random_seed"),
    *("allow_auto_truncate", "enable_deterministic_inference"),
    *("enable_multimodal", "mm_process_config"),
)
"""Options of the engine that answers depend on. The others (memory, sizes, devices) may change
from one run of a job to the next."""


def description(
    args: ServerArgs, asking: Asking, output_format: str, results: Mapping[str, str]
) -> dict[str, Any]:
    """What makes a job another job, beside its input."""
    options = {name: getattr(args, name) for name in DECIDING}
    if os.path.exists(args.model_path):
        options["model_path"] = os.path.abspath(args.model_path)
    told = {
        **options,
        "sampling_params": dict(asking.defaults),
        "columns": dataclasses.asdict(asking.columns),
        "output_format": output_format,
        "results": dict(results),
    }
    return json.loads(json.dumps(checks.json_value("the options", told)))


def write(folder: Folder, described: Mapping[str, Any], input: Input) -> None:
    """Before the first part."""
    told = {"version": VERSION, "job": described, "input": dataclasses.asdict(input)}
    folder.write_json(folder.manifest, told)


def read(folder: Folder, described: Mapping[str, Any], part_rows: int | None) -> Input | None:
    """The input of the job that the folder belongs to; None if there is none yet. Raises
    InvalidRequestError if it is another job than the one described."""
    told = read_json(folder.manifest)
    if told is None:
        return None
    if told["version"] != VERSION:
        raise InvalidRequestError(f"{str(folder.manifest)!r} has version {told['version']}")
    for name, value in described.items():
        there = told["job"].get(name)
        if there != value:
            raise another(
                folder, f"{name} is {checks.quoted(value)}, and was {checks.quoted(there)}"
            )
    known = told["input"]
    if part_rows not in (None, known["part_rows"]):
        raise another(folder, f"part_rows is {part_rows}, and was {known['part_rows']}")
    files = tuple(InputFile(**file) for file in known["files"])
    return Input(files, known["columns"], known["part_rows"])


def another(folder: Folder, why: str) -> InvalidRequestError:
    """The error for a folder of another job."""
    return InvalidRequestError(f"output {str(folder.path)!r} belongs to another job: {why}")
