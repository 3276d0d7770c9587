"""One file per operator: its cases and its providers, as ``OPERATOR``."""
