"""The version of the package. No other place has it."""

__version__ = "0.1.0"
