"""Errors meant for the person at the keyboard: what was wrong, the value seen, what would be right.

The command line prints their message alone, without a traceback, and exits with status 2.
"""


class MeshloomError(Exception):
    """Base of every error that a user can cause and mend."""


class ConfigError(MeshloomError):
    """A configuration key or value that is not valid."""


class CheckpointError(MeshloomError):
    """A checkpoint or weight file that cannot be read or written."""


class ModelError(MeshloomError):
    """A model description that makes no sense, or that is not supported."""


class ShardingError(MeshloomError):
    """A mesh or layout that cannot be had."""


class RequestError(MeshloomError):
    """A serving request that cannot be honoured (HTTP 400)."""
