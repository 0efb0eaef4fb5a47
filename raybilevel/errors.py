"""What raybilevel raises.

RaybilevelError
├── ConfigError      (ValueError)        a config file or a setting is wrong
├── SpaceError       (ValueError)        a search space cannot be searched
├── ProblemError     (ValueError)        a BilevelProblem breaks its contract
├── DataError        (OSError)           a data file is missing or damaged
├── StorageError     (OSError)           an experiment's storage cannot be reached
├── StateError       (ValueError)        a saved search cannot be read
├── CheckpointError  (ValueError)        a lower-level checkpoint cannot be read
├── StepError        (RuntimeError)      an upper-level step raised something, in another process
└── NotFiniteError   (ArithmeticError)   a loss or a gradient is NaN or infinite
"""

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "NotFiniteError",
    "ProblemError",
    "RaybilevelError",
    "SpaceError",
    "StateError",
    "StepError",
    "StorageError",
]


class RaybilevelError(Exception):
    """Base class of everything raybilevel raises on purpose."""


class ConfigError(RaybilevelError, ValueError):
    """A config file or a setting is wrong. The message names the file and the key."""


class SpaceError(RaybilevelError, ValueError):
    """A search space cannot be searched. The message names the hyperparameter."""


class ProblemError(RaybilevelError, ValueError):
    """A `BilevelProblem` breaks its contract. The message names the method or the attribute."""


class DataError(RaybilevelError, OSError):
    """A data file is missing or damaged. The message names it."""


class StorageError(RaybilevelError, OSError):
    """An experiment's storage cannot be reached."""


class StateError(RaybilevelError, ValueError):
    """A saved search cannot be read: it is damaged, of another version, or of another search."""


class CheckpointError(RaybilevelError, ValueError):
    """A lower-level checkpoint cannot be read."""


class StepError(RaybilevelError, RuntimeError):
    """An upper-level step raised something in another process. The message has its traceback as text, since not every
    exception can be sent back."""


class NotFiniteError(RaybilevelError, ArithmeticError):
    """A loss or a gradient is NaN or infinite."""
