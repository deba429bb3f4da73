"""The version of lorax."""

__version__ = "0.1.0"
