"""The version of the package: pyproject.toml and everything else read it here."""

__version__ = "0.1.0"
