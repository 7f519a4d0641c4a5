"""`run`: a batch job from its arguments to its report."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxserve import checks
from jaxserve.bar import Bar
from jaxserve.batch import inputs, local, manifest, on_ray, parquet
from jaxserve.batch.columns import Asking, Columns, check_samples
from jaxserve.batch.folder import Folder, read_json
from jaxserve.batch.inputs import Input
from jaxserve.batch.job import RESULTS, Job
from jaxserve.batch.sources import Files, Source, source_of
from jaxserve.batch.tally import Report, Tally
from jaxserve.errors import InvalidRequestError
from jaxserve.options import OPTIONS
from jaxserve.sampling_params import SamplingParams
from jaxserve.server_args import ServerArgs

FORMATS = ("jsonl", "parquet")
RUNNERS = ("auto", "local", "ray")


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobOptions:
    """The arguments of a job beside its input, its output and its engine."""

    columns: Columns = dataclasses.field(default_factory=Columns)
    """Of the input."""
    sampling_params: Mapping[str, Any] | None = None
    """Of all rows, under each row's own and over `preferred_sampling_params`."""
    output_format: str = "jsonl"
    """jsonl or parquet."""
    output_ids: bool = False
    """Whether the output has the tokens' ids too."""
    output_prefix: str = ""
    """Before the names of the output's own columns."""
    part_rows: int | None = None
    """Rows of a part file; None: 256 for most inputs."""
    parts_in_flight: int = 4
    """Parts that an engine answers at a time."""
    runner: str = "auto"
    """local: this machine's devices; ray: a Ray cluster; auto: ray where Ray is installed."""
    dp_size: int | None = None
    """Engines; None: as many as the Ray cluster has GPUs for, one with the local runner."""
    cpus_per_engine: float = 1
    """CPUs that an engine takes of a Ray cluster."""
    cost_per_hour: float | None = None
    """Of all machines together, for the report."""
    progress: bool | None = None
    """Whether a bar shows how far it is; None: in a terminal."""

    def __post_init__(self) -> None:
        _one_of("output_format", self.output_format, FORMATS)
        _one_of("runner", self.runner, RUNNERS)
        checks.text("output_prefix", self.output_prefix)
        checks.integer("parts_in_flight", self.parts_in_flight, 1)
        checks.number("cpus_per_engine", self.cpus_per_engine, 0.0)
        for name in ("part_rows", "dp_size"):
            if getattr(self, name) is not None:
                checks.integer(name, getattr(self, name), 1)
        if self.cost_per_hour is not None:
            checks.number("cost_per_hour", self.cost_per_hour, 0.0)
        if self.output_format == "parquet":
            parquet.check_installed()
        if self.runner == "ray":
            on_ray.check_installed()

    @property
    def chosen_runner(self) -> str:
        """ray or local."""
        if self.runner != "auto":
            return self.runner
        return "ray" if on_ray.installed() else "local"


def run_job(
    given: Any, output: str | os.PathLike[str], args: ServerArgs, options: JobOptions
) -> Report:
    """`jaxserve.batch.run` with its arguments sorted."""
    began = time.perf_counter()
    if args.max_queued_requests is not None:
        raise InvalidRequestError(
            f"max_queued_requests={args.max_queued_requests} would refuse rows of a batch job"
        )
    for name in ("mesh", "base_gpu_id", "gpu_id_step"):
        if getattr(args, name) != OPTIONS[name].default:
            raise InvalidRequestError(
                f"{name}={checks.shown(getattr(args, name))} is not for a batch job, which gives "
                "its engines their GPUs: CUDA_VISIBLE_DEVICES says which, dp_size and tp_size how "
                "many"
            )
    asking = _asking(args, options)
    with_ids = options.output_ids or args.skip_tokenizer_init
    results = {n: options.output_prefix + n for n in RESULTS if n != "output_ids" or with_ids}
    source = source_of(given)
    folder = Folder(checks.text("output", os.fspath(output)), f".{options.output_format}")
    described = manifest.description(args, asking, options.output_format, results)
    folder.check()
    fresh: Input | None = None
    if isinstance(source, Files) and not folder.manifest.exists():
        fresh = _scanned(source.given, asking, results, options)  # before there is a folder
    with folder.locked():
        known = manifest.read(folder, described, options.part_rows)
        if known is None:
            found = fresh or _scanned(source.write(folder), asking, results, options)
            manifest.write(folder, described, found)
        else:
            found = _same(folder, source, known)
        job = Job(
            input=found,
            folder=folder,
            output_format=options.output_format,
            asking=asking,
            server_args=args,
            results=results,
            parts_in_flight=options.parts_in_flight,
        )
        return _finish(job, options, began)


def _finish(job: Job, options: JobOptions, began: float) -> Report:
    """Does what is missing, and counts everything."""
    numbers = [part.number for part in job.parts]
    missing = job.folder.missing(numbers)
    counted = read_json(job.folder.report)
    if not missing and counted is not None:
        return Report(Tally(**counted), Tally(), str(job.folder.path), "none")
    there = sorted(set(numbers) - set(missing))
    now, runner = Tally(), options.chosen_runner if missing else "none"
    rows = sum(job.parts[number].rows for number in there)
    disable = None if options.progress is None else not options.progress
    with Bar(total=job.input.rows, initial=rows, desc="Rows", unit="row", disable=disable) as bar:
        for tally in _tallies(job, missing, runner, options):
            now += tally
            bar.update(tally.rows)
            bar.set_postfix_str(_rates(now), refresh=False)
    seconds = time.perf_counter() - began
    total = sum(map(job.count, there), now)
    job.folder.write_json(job.folder.report, dataclasses.asdict(total))
    return Report(total, now, str(job.folder.path), runner, seconds, options.cost_per_hour)


def _tallies(job: Job, numbers: Sequence[int], runner: str, options: JobOptions) -> Iterator[Tally]:
    if not numbers:
        return iter(())
    if runner == "ray":
        return on_ray.cluster(job, numbers, options.dp_size, options.cpus_per_engine)
    if options.dp_size in (None, 1):
        return local.here(job, numbers)
    return local.processes(job, numbers, options.dp_size)


def _rates(now: Tally) -> str:
    span = max(now.ended - now.started, 1e-9)
    failed = f", {now.failed} failed" if now.failed else ""
    return f"{now.completion_tokens / span:,.0f} tokens/s{failed}"


def _asking(args: ServerArgs, options: JobOptions) -> Asking:
    defaults = {**args.preferred_params, **(options.sampling_params or {})}
    SamplingParams.from_dict(defaults)
    check_samples(defaults)
    return Asking(options.columns, defaults, args.random_seed)


def _scanned(
    paths: Sequence[str], asking: Asking, results: Mapping[str, str], options: JobOptions
) -> Input:
    typed = options.output_format == "parquet"
    found = inputs.scan(paths, asking.columns, options.part_rows, typed)
    for name in results.values():
        if name in found.columns and asking.columns.carries(name):
            raise InvalidRequestError(
                f"input has a column {name!r}, which is one of the output's own; output_prefix "
                "gives those other names"
            )
    return found


def _same(folder: Folder, source: Source, known: Input) -> Input:
    """The input that the folder's job has, where it lies now. Raises InvalidRequestError if the
    source is another one."""
    difference = source.difference(folder, known)
    if difference is not None:
        raise manifest.another(folder, difference)
    return known.at(source.paths(folder))


def _one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InvalidRequestError(
            f"{name} must be one of {', '.join(choices)}, got {checks.shown(value)}"
        )
