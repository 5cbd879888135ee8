"""The package's version, on its own so that anything can record it."""

__version__ = "0.1.0"
