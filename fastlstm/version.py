"""The version of the package. No other place has it."""

__version__ = "1.0.0"
