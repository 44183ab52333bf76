"""Errors that are somebody's to mend: each is one sentence of what was expected, what was found, and what to do."""


class Blip2nbError(Exception):
    """Base of the kit's errors. `exit_status` is what the command line ends with."""

    exit_status = 3


class RequestError(Blip2nbError):
    """The request or its input is wrong; nothing was written. Exit status 2."""

    exit_status = 2


class Diverges(Blip2nbError):
    """The two models differ and no known cause explains it. Exit status 1."""

    exit_status = 1
