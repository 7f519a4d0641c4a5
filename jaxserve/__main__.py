"""`python -m jaxserve MODEL [PROMPT]`: a chat in the terminal, or one answer."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from jaxserve.errors import JaxserveError
from jaxserve.sampling_params import SamplingParams
from jaxserve.server_args import ServerArgs

USAGE = "python -m jaxserve MODEL [PROMPT] [option ...]"
DESCRIPTION = """\
Chats with a model (a folder, a .gguf file or a hub id). With PROMPT, prints one answer to it.
MODEL comes first; all options of Engine may follow, as in --dtype bfloat16."""
MAX_NEW_TOKENS = 1024
INTERRUPTED = 130
"""The exit status of what Ctrl-C has ended, in every shell."""


def make_parser() -> argparse.ArgumentParser:
    """MODEL is read as `--model-path MODEL`, the engine's own flag."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxserve",
        usage=USAGE,
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="what to answer, once")
    chat = parser.add_argument_group("answers")
    chat.add_argument("--system", metavar="TEXT", help="the system message before all others")
    chat.add_argument("--max-new-tokens", type=int, metavar="N", default=MAX_NEW_TOKENS)
    chat.add_argument("--temperature", type=float, metavar="T", help="0: the likeliest token")
    chat.add_argument("--top-p", type=float, metavar="P")
    chat.add_argument("--top-k", type=int, metavar="K")
    chat.add_argument("--min-p", type=float, metavar="P")
    chat.add_argument("--repetition-penalty", type=float, metavar="X")
    chat.add_argument("--sampling-seed", type=int, metavar="N", help="the same answers each time")
    ServerArgs.add_cli_args(parser)
    parser.set_defaults(log_level="error")
    return parser


SAMPLING = (
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "sampling_seed",
)


def main(arguments: list[str]) -> int:
    """The exit status: 0, 1 after an error (one line on stderr), 2 for bad usage, 130 for Ctrl-C
    outside of a chat."""
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--model-path", *arguments]
    given = make_parser().parse_args(arguments)
    sampling: dict[str, Any] = {name: getattr(given, name) for name in SAMPLING}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    try:
        options = ServerArgs.from_cli_args(given)
        SamplingParams.from_dict(sampling)  # before the model loads
        from jaxserve.engine import Engine  # JAX takes a second to import
        from jaxserve.terminal import Terminal

        with Engine(server_args=options) as engine:
            terminal = Terminal(engine, sampling, given.system)
            if given.prompt is None:
                terminal.chat()
            else:
                terminal.answer(given.prompt)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the answer has had enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except JaxserveError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
