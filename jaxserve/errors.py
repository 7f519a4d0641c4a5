"""Exceptions raised by jaxserve. Each also subclasses the built-in that SGLang users catch."""

from __future__ import annotations

LONGEST_MESSAGE = 9_000
"""Characters. Libraries put whole files into what they raise."""


class JaxserveError(Exception):
    """Base of every exception that jaxserve raises on purpose."""

    def __init__(self, message: str = "") -> None:
        more = len(message) - LONGEST_MESSAGE
        if more > 0:
            message = f"{message[:LONGEST_MESSAGE]}... and {more} characters more"
        super().__init__(message)


class InvalidRequestError(JaxserveError, ValueError):
    """A call's arguments are wrong. The message names the parameter and the value."""


class UnknownOptionError(JaxserveError, TypeError):
    """A keyword or a sampling key that does not exist."""


class NotSupportedError(JaxserveError, ValueError):
    """Known to SGLang's API, not supported (yet) by jaxserve. The message says so."""


class ModelLoadError(JaxserveError, ValueError):
    """A checkpoint is missing, damaged or does not fit its config."""


class ProfileError(JaxserveError, RuntimeError):
    """A profile cannot start or stop now: one runs already, or none does."""


class RequestFailedError(JaxserveError, RuntimeError):
    """The engine failed at this request alone, and goes on; `__cause__` is that failure."""

    @classmethod
    def caused_by(cls, failure: BaseException) -> RequestFailedError:
        """A fresh one for each caller: an exception raised in several threads grows a traceback of
        all of them."""
        error = cls(f"the request failed: {type(failure).__name__}: {failure}")
        error.__cause__ = failure
        return error


class EngineDeadError(JaxserveError, RuntimeError):
    """The engine thread has stopped after a failure; `__cause__` is that failure."""


class OutOfPagesError(JaxserveError, MemoryError):
    """Fewer KV pages are free than were asked for; nothing was taken."""


class HandleLostError(JaxserveError, RuntimeError):
    """The device has lost the keys and values of a handle (`Engine.lab`) in a failed step.
    `Lab.rebuild` computes them again from the tokens."""


class ForkedProcessError(JaxserveError, RuntimeError):
    """An engine, or JAX, was used in a process forked from the one that started it."""


class CopyError(JaxserveError, TypeError):
    """Engines and streams can neither be pickled nor copied."""


class EngineShutdownError(JaxserveError, RuntimeError):
    """The engine was shut down before or during the call."""


def is_panic(error: BaseException) -> bool:
    """Whether Rust code behind Python has panicked. pyo3's PanicException is no Exception, and
    has no module to import it from."""
    return type(error).__name__ == "PanicException" and type(error).__module__ == "pyo3_runtime"
