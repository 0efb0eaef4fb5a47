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
    """A config file or a setting is wrong."""


class SpaceError(RaybilevelError, ValueError):
    """A search space cannot be searched."""


class ProblemError(RaybilevelError, ValueError):
    """A `BilevelProblem` breaks its contract."""


class DataError(RaybilevelError, OSError):
    """A data file is missing or damaged."""


class StorageError(RaybilevelError, OSError):
    """An experiment's storage cannot be reached."""


class StateError(RaybilevelError, ValueError):
    """A saved search cannot be read."""


class CheckpointError(RaybilevelError, ValueError):
    """A lower-level checkpoint cannot be read."""


class StepError(RaybilevelError, RuntimeError):
    """An upper-level step raised something, in another process; with its traceback as text, as not every exception
    survives the way back."""


class NotFiniteError(RaybilevelError, ArithmeticError):
    """A loss or a gradient is NaN or infinite."""
