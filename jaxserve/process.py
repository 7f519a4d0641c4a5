"""The process an engine lives in: what a fork leaves behind, and why nothing can be copied. No jax.

A forked child has this process's memory without its threads: neither the engine's nor those of
JAX's clients, which wait for their threads when they are destroyed (or crash, CPU, jax 0.10.2).
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import sys
import threading
from typing import Any, NoReturn

from jaxserve.errors import CopyError, ForkedProcessError

inherited_clients: list[Any] = []
"""JAX's clients that this process has from the one it was forked from."""


@dataclasses.dataclass(frozen=True, slots=True)
class Home:
    """The process in which this was made."""

    pid: int = dataclasses.field(default_factory=os.getpid)

    @property
    def left(self) -> bool:
        """Whether this is another process, one forked from it: locks may be held for ever there."""
        return os.getpid() != self.pid

    def check(self) -> None:
        """Raises ForkedProcessError in another process."""
        if self.left:
            raise ForkedProcessError(
                f"this engine belongs to process {self.pid} and was called in process "
                f"{os.getpid()}, which was forked from it without its threads. Call it there, or "
                "build an Engine in a process that multiprocessing starts with 'spawn'"
            )


class Uncopyable:
    """Cannot be pickled, copied or sent to another process: CopyError."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        name = type(self).__name__
        raise CopyError(
            f"{name} cannot be pickled or copied: its threads and its device memory belong to "
            f"process {os.getpid()}. Build an Engine in each process, and pass prompts and results"
        )


def abandon(thing: Any) -> None:
    """Never destroy `thing`, not even when the interpreter ends: it would wait for threads."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def interrupt(thread: threading.Thread, error: type[BaseException]) -> None:
    """Raises `error` in `thread` as soon as it runs Python code: not while it is in C++."""
    if thread.ident is not None:
        number, raised = ctypes.c_ulong(thread.ident), ctypes.py_object(error)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(number, raised)


def check_jax() -> None:
    """Raises ForkedProcessError where JAX was started by the process that this one was forked from:
    its first larger program would wait for ever."""
    if inherited_clients:
        raise ForkedProcessError(
            f"Engine() in process {os.getpid()}: JAX was used by process {os.getppid()} before "
            "it forked this one, without the threads of JAX. Start this process with "
            "multiprocessing's 'spawn', or fork before anything is computed with JAX"
        )


def end_despite() -> bool:
    """Called at the interpreter's end, makes the process end with its status although threads are
    deep in C++ code of JAX, which they would leave for an interpreter that is gone.

    Python 3.11 to 3.13 ends such a thread by unwinding its stack, which C++ does not allow: the
    process would abort with status 134. Instead the thread stops where it is, for ever, and the
    process ends before the destructors of global objects that it may still use. False where the
    C library has no `on_exit` (macOS): threads must be waited for there.
    """
    program = ctypes.CDLL(None)
    try:
        runtime = ctypes.CDLL("libstdc++.so.6")
        set_terminate = runtime._ZSt13set_terminatePFvvE  # std::set_terminate
        on_exit, leave, stop = program.on_exit, program._exit, program.pause
    except (OSError, AttributeError):
        return False
    set_terminate(ctypes.cast(stop, ctypes.c_void_p))
    on_exit(ctypes.cast(leave, ctypes.c_void_p), None)
    return True


def _in_forked_child() -> None:
    # Not imported: where JAX is not loaded, it has no threads. It has no public names for these.
    bridge = sys.modules.get("jax._src.xla_bridge")
    lowering = sys.modules.get("jax._src.interpreters.mlir")
    inherited_clients.extend(getattr(bridge, "_backends", {}).values())
    for owner in (*inherited_clients, getattr(lowering, "global_thread_pool", None)):
        abandon(owner)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked_child)
