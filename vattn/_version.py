"""The version of vattn, in one place."""

__version__ = "0.1.0"
