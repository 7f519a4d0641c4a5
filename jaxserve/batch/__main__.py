"""`python -m jaxserve.batch --model M --input IN --output OUT`: a batch job."""

from __future__ import annotations

import argparse
import inspect
import sys

from jaxserve.batch import run
from jaxserve.batch.run import FORMATS, RUNNERS
from jaxserve.errors import JaxserveError
from jaxserve.options.option import json_object
from jaxserve.sampling_params import FIELD_NAMES
from jaxserve.server_args import ServerArgs

USAGE = "python -m jaxserve.batch --model MODEL --input IN ... --output OUT [option ...]"
DESCRIPTION = """\
Answers every row of files of JSONL, CSV or Parquet into a folder. The same command again goes on
where a crash, a kill or a lost machine stopped it. All options of Engine may follow, as in
--tp-size 2; docs/guide/batch_jobs.md has everything else."""
INTERRUPTED = 130
"""The exit status of what Ctrl-C has ended, in every shell."""


def make_parser() -> argparse.ArgumentParser:
    """The flags of a job, then those of the engine. --dp-size is the job's: engines, each in a
    process of its own."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxserve.batch",
        usage=USAGE,
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    job = parser.add_argument_group("the job")
    add = job.add_argument
    add("--input", nargs="+", required=True, metavar="IN", help="files, or folders of files")
    add("--output", required=True, metavar="OUT", help="a folder, of this job alone")
    add("--sampling-params", metavar="JSON", help="of all rows; a row's own go over them")
    add("--prompt-column", metavar="NAME", default="prompt")
    add("--messages-column", metavar="NAME", default="messages")
    add("--input-ids-column", metavar="NAME", default="input_ids")
    add("--image-data-column", metavar="NAME", default="image_data")
    add("--sampling-params-column", metavar="NAME", default="sampling_params")
    add(
        "--sampling-columns",
        nargs="*",
        metavar="NAME",
        default=FIELD_NAMES,
        help="columns that are a sampling parameter each; by default all of such a name",
    )
    add("--output-format", choices=FORMATS, default="jsonl")
    add("--output-ids", action="store_true", help="the tokens' ids too")
    add("--output-prefix", metavar="TEXT", default="", help="before the output's own columns")
    add("--part-rows", type=int, metavar="N", help="rows of a part file")
    add("--parts-in-flight", type=int, metavar="N", default=4, help="of an engine")
    add("--runner", choices=RUNNERS, default="auto", help="auto: ray where Ray is installed")
    add("--cpus-per-engine", type=float, metavar="N", default=1, help="of a Ray cluster")
    add("--cost-per-hour", type=float, metavar="X", help="of all machines together")
    add("--progress", action=argparse.BooleanOptionalAction, help="a bar; default: in a terminal")
    ServerArgs.add_cli_args(parser)
    parser.set_defaults(log_level="error", dp_size=None)
    return parser


def main(arguments: list[str]) -> int:
    """The exit status: 0, 1 after an error (one line on stderr), 2 for bad usage, 130 for
    Ctrl-C. Rows that failed are no error: the output says why."""
    given = make_parser().parse_args(arguments)
    try:
        if given.sampling_params:
            given.sampling_params = json_object("sampling_params", given.sampling_params)
        # a flag has the name of the argument of `run` that it is; the others are the engine's
        names = inspect.signature(run).parameters.keys() - {"input", "output", "model_path"}
        job = {name: value for name, value in vars(given).items() if name in names}
        given.dp_size = 1  # of each engine
        args = ServerArgs.from_cli_args(given)
        print(run(given.input, given.output, server_args=args, **job))
    except KeyboardInterrupt:
        return INTERRUPTED
    except JaxserveError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
