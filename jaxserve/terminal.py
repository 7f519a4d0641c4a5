"""A conversation with a model on standard input and output."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from jaxserve.errors import InvalidRequestError, RequestFailedError
from jaxserve.utils import new_texts

if TYPE_CHECKING:
    from jaxserve.engine import Engine

HELP = "/clear forgets the conversation, /exit or Ctrl-D ends, Ctrl-C ends an answer."
NO_TEMPLATE = "The model has no chat template: each line is continued as it stands."


class Terminal:
    """Answers what is typed, and prints the answers as they come.

    sampling: of every answer. system: the first message of the conversation. A model without a chat
    template continues each line for itself.
    """

    def __init__(self, engine: Engine, sampling: Mapping[str, Any], system: str | None) -> None:
        self._engine = engine
        self._sampling = sampling
        self._start = [{"role": "system", "content": system}] if system is not None else []
        self._messages = list(self._start)
        self._chats = bool(getattr(engine.tokenizer, "chat_template", None))
        if system is not None and not self._chats:
            raise InvalidRequestError(
                f"--system needs a chat template, and {engine.server_args.model_path} has none"
            )

    def chat(self) -> None:
        """Reads lines and answers each, until "/exit" or the end of the input. What a line cannot
        be answered for goes to stderr, and the conversation goes on without it."""
        typed = sys.stdin.isatty()
        if typed:
            import readline  # noqa: F401 - makes `input` edit lines and recall earlier ones
        if not self._chats:
            print(NO_TEMPLATE)
        if typed:
            print(HELP)
        while (line := self._read("> " if typed else "")) is not None:
            try:
                self._obey(line)
            except KeyboardInterrupt:
                print()
            except (InvalidRequestError, RequestFailedError) as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)

    def answer(self, text: str) -> None:
        """Prints the answer to one message. Raises what `Engine.generate` does, KeyboardInterrupt
        included."""
        for piece in self._pieces([*self._messages, {"role": "user", "content": text}]):
            print(piece, end="", flush=True)
        print()

    def _obey(self, line: str) -> None:
        if line.strip() in ("/clear", "/help"):
            if line.strip() == "/clear":
                self._messages = list(self._start)
            print(HELP)
        elif line.strip():
            self._take_turn(line)

    def _take_turn(self, line: str) -> None:
        """An answer that Ctrl-C cuts short counts as far as it was shown."""
        messages = [*self._messages, {"role": "user", "content": line}]
        shown = ""
        try:
            for piece in self._pieces(messages):
                print(piece, end="", flush=True)
                shown += piece
            print()
        finally:
            if self._chats and shown:
                self._messages = [*messages, {"role": "assistant", "content": shown}]

    def _pieces(self, messages: list[dict[str, str]]) -> Iterator[str]:
        """The answer to the last message, piece by piece."""
        engine = self._engine
        if self._chats:
            chunks = engine.chat(messages, self._sampling, stream=True)
        else:
            chunks = engine.generate(messages[-1]["content"], self._sampling, stream=True)
        return new_texts(engine, chunks)

    def _read(self, prompt: str) -> str | None:
        """The next line; None at the end. Ctrl-C drops the line begun, as in a shell."""
        while True:
            try:
                line = input(prompt)
            except KeyboardInterrupt:
                print()
            except EOFError:
                if prompt:
                    print()
                return None
            else:
                return None if line.strip() == "/exit" else line
