"""Batch jobs: every row of a file answered once, whatever crashes in between.

    import jaxserve.batch

    report = jaxserve.batch.run("in.jsonl", "out", "path/to/model", sampling_params={"top_k": 1})

The same on the command line: `python -m jaxserve.batch --help`. docs/guide/batch_jobs.md.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve import checks
from jaxserve.batch.columns import Columns
from jaxserve.batch.run import JobOptions, run_job
from jaxserve.batch.tally import Report, Tally
from jaxserve.errors import InvalidRequestError, UnknownOptionError
from jaxserve.sampling_params import FIELD_NAMES
from jaxserve.server_args import ServerArgs

__all__ = ["Report", "Tally", "run"]


def run(
    input: Any,
    output: str | os.PathLike[str],
    model_path: str | os.PathLike[str] | None = None,
    *,
    sampling_params: Mapping[str, Any] | None = None,
    prompt_column: str = "prompt",
    messages_column: str = "messages",
    input_ids_column: str = "input_ids",
    image_data_column: str = "image_data",
    sampling_params_column: str = "sampling_params",
    sampling_columns: Sequence[str] | None = None,
    output_format: str = "jsonl",
    output_ids: bool = False,
    output_prefix: str = "",
    part_rows: int | None = None,
    parts_in_flight: int = 4,
    runner: str = "auto",
    dp_size: int | None = None,
    cpus_per_engine: float = 1,
    cost_per_hour: float | None = None,
    progress: bool | None = None,
    server_args: ServerArgs | None = None,
    **options: Any,
) -> Report:
    """Answers every row of `input` into the folder `output`. A later call with the same arguments
    goes on where an earlier one stopped, and does nothing if that had finished.

    input: a file or a folder of JSONL, CSV or Parquet, a list of such, a list of dicts, or a Ray
    Dataset. options: those of `Engine`, or one server_args. What the others mean:
    docs/guide/batch_jobs.md.

    Raises InvalidRequestError, UnknownOptionError and NotSupportedError for what is wrong with the
    arguments, the input or the folder, before any engine starts; ModelLoadError; EngineDeadError
    when engines died too often. Parts that are done stay.
    """
    columns = Columns(
        prompt=prompt_column,
        messages=messages_column,
        input_ids=input_ids_column,
        image_data=image_data_column,
        sampling_params=sampling_params_column,
        sampling=FIELD_NAMES if sampling_columns is None else tuple(sampling_columns),
    )
    job = JobOptions(
        columns=columns,
        sampling_params=sampling_params,
        output_format=output_format,
        output_ids=output_ids,
        output_prefix=output_prefix,
        part_rows=part_rows,
        parts_in_flight=parts_in_flight,
        runner=runner,
        dp_size=dp_size,
        cpus_per_engine=cpus_per_engine,
        cost_per_hour=cost_per_hour,
        progress=progress,
    )
    return run_job(input, output, _engine_options(server_args, model_path, options), job)


def _engine_options(
    server_args: ServerArgs | None,
    model_path: str | os.PathLike[str] | None,
    options: Mapping[str, Any],
) -> ServerArgs:
    """As `Engine` takes them."""
    if server_args is None:
        return ServerArgs(model_path, **{"log_level": "error", **options})
    if model_path is not None or options:
        given = [*(["model_path"] if model_path is not None else []), *options]
        raise UnknownOptionError(f"server_args is given; put {', '.join(given)} into it")
    if not isinstance(server_args, ServerArgs):
        raise InvalidRequestError(
            f"server_args must be a jaxserve.ServerArgs, got {checks.shown(server_args)}"
        )
    return server_args
