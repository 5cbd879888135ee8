"""Every exception that halfbyte raises on purpose.

HalfbyteError
├── ShapeError        (also ValueError)    a tensor's shape, dtype or stride does not fit
├── FormatError       (also ValueError)    a format, option or pattern that has no meaning
├── CheckpointError   (also ValueError)    a checkpoint on disk is damaged, unknown or contradictory
├── SyncError         (also RuntimeError)  live weights did not arrive whole; the old version still serves
└── UnsupportedError  (also RuntimeError)  right in itself, but not on this machine or with what is installed
"""


class HalfbyteError(Exception):
    """Base of all errors raised on purpose; its message names the argument, the actual value and the remedy."""


class ShapeError(HalfbyteError, ValueError):
    """A tensor's shape or dtype does not fit the format."""


class FormatError(HalfbyteError, ValueError):
    """A format, option or pattern that has no meaning."""


class CheckpointError(HalfbyteError, ValueError):
    """A checkpoint on disk is damaged, unknown or contradictory."""


class SyncError(HalfbyteError, RuntimeError):
    """Live weights did not arrive, or not whole, or are not the ones expected; what was served before still is."""


class UnsupportedError(HalfbyteError, RuntimeError):
    """The request is meaningful but cannot run on this machine or with the packages installed."""
