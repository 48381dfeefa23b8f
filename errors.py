"""The errors that a user can cause or meet, each with the exit code of its process.

A message is one line: the file or the key first, then what is wrong, then what to do. Everything else that
is raised is a defect of this program and keeps its traceback.
"""


class UserError(Exception):
    """Base of the errors that end a script with one line on standard error instead of a traceback."""

    exit_code = 2


class ConfigurationError(UserError):
    """A key, a path, classes, taps or data that are wrong, or a network that is needed and absent."""


class DamagedFileError(UserError):
    """A checkpoint, weight file or cache that exists but is damaged, incomplete or belongs to something else."""

    exit_code = 3


class NonFiniteError(UserError):
    """A loss or gradient that is not finite."""

    exit_code = 4


class MachineError(UserError):
    """The machine failed: disk full, a dead worker, out of memory."""

    exit_code = 5


class Terminated(UserError):
    """SIGTERM arrived; the run saved itself and can be resumed."""

    exit_code = 143
