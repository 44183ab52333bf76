"""Ctrl-C for what the tests start, also where they run in the background of a script."""

import signal


def heard() -> None:
    """A shell without job control has what it starts in the background ignore SIGINT, and each child inherits that.
    Where that is so, undo it: a handler of this process becomes the default one in what it starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
