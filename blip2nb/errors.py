"""Errors that are somebody's to mend: each is one sentence of what was expected, what was found, and what to do.

Travels to where LAVIS is: Python 3.8.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator


class Blip2nbError(Exception):
    """Base of the kit's errors. `exit_status` is what the command line ends with."""

    exit_status = 3


class RequestError(Blip2nbError):
    """The request or its input is wrong; nothing was written. Exit status 2."""

    exit_status = 2


class Diverges(Blip2nbError):
    """The two models differ and no known cause explains it. Exit status 1."""

    exit_status = 1


class OutOfMemory(Blip2nbError):
    """Memory ran out before the work was done, so nothing was found out. Exit status 3."""


_MEMORY = re.compile(
    "(cannot|can't|unable to|failed to|could not|not enough memory: you tried to) (re)?allocate|out of memory"
    r"|\bMemoryError\b|bad_?alloc|allocation error|failed to map segment|can't start new thread",
    re.IGNORECASE,
)
"""What libraries say when memory runs out. On the CPU torch raises a plain RuntimeError, safetensors an error of its
own, the dynamic linker an ImportError; a thread that has no room for its stack is not started."""


_LITTLE = 2**26
"""Bytes that any machine can give on which this kit works; a system that refuses them is at its limit. Chosen: any
value does from what one layer's activations take, some MB, to what is left on a healthy system, some hundred MB."""


def memory_ran_out(error: BaseException | None) -> bool:
    """Check whether memory ran out: by an error, by one that it was raised from or while handling, or by asking for a
    little memory, since native code, Python's own too, may raise whatever when it gets none (a SystemError from an
    import, "could not create a primitive" from oneDNN).
    """
    if error is not None and not isinstance(error, Blip2nbError):
        try:
            bytes(_LITTLE)  # of pages that nothing touches
        except MemoryError:
            return True
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        lacking = isinstance(error, OSError) and error.errno == errno.ENOMEM
        if isinstance(error, (MemoryError, OutOfMemory)) or lacking or _MEMORY.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def memory_watched(work: str) -> Iterator[None]:
    """Raise OutOfMemory for whatever error says that memory ran out.

    Args:
        work: when it ran out: "while verifying".
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory) or not memory_ran_out(error):
            raise
        raise OutOfMemory(no_memory(work, error)) from error


def no_memory(work: str, error: BaseException) -> str:
    """The sentence for memory that ran out, and what to do."""
    first = (str(error).splitlines() or [""])[0] or type(error).__name__
    return (
        f"Memory ran out {work} ({first:.200}). Free memory, raise its limit or use a machine with more; proving the "
        "weights alone (--proof weights) takes the least."
    )
