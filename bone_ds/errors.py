"""Errors that a user can cause. Each message is one or two lines: the file or field, the value, and what to do."""

USER_ERROR = 2
"""The exit code of a command that a BoneError ended."""


def printable(text: str, characters: int = 4000) -> str:
    """For a terminal: names that stand in files may hold what steers one, or be long."""
    text = text if len(text) <= characters else text[:characters] + "..."
    return "".join(one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode() for one in text)


class BoneError(Exception):
    """Base of every error that is the user's to mend; the command line prints it without a traceback and exits with USER_ERROR."""


class ConfigError(BoneError):
    """The YAML, an override, or the DeepSpeed JSON is wrong."""


class InjectionError(BoneError):
    """The adapter can't be put into this model: unknown targets, or a block size that divides no layer."""


class CheckpointError(BoneError):
    """A file of weights can't be used: a model directory, an adapter, a training checkpoint."""


class DataError(BoneError):
    """A data file or a row of it can't be trained on."""


class MemoryLimitError(BoneError):
    """The run needs more memory than there is."""


class LostRankError(Exception):
    """Another rank is gone or hangs: nothing in the config is wrong. The command line prints it without a traceback and exits with 1."""

    def __init__(self, message: str, speaks: bool, hangs: bool):
        """speaks: whether this rank is the one to say it; the others know the same. hangs: no launcher knows it yet."""
        super().__init__(message)
        self.speaks, self.hangs = speaks, hangs
