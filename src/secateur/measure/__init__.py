"""What a model is: parameters, zeros, bytes, perplexity, time, memory."""

from __future__ import annotations

from .quality import Perplexity, perplexity
from .size import Peak, count_parameters, machine, versions

__all__ = ["Peak", "Perplexity", "count_parameters", "machine", "perplexity", "versions"]
