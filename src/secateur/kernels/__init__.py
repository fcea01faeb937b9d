"""Native kernels for sparse weights on ordinary processors."""

from . import ops
from .library import described, library

__all__ = ["described", "library", "ops"]
