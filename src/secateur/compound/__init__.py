"""Several steps as one recipe: prune, decompose, quantize and train in the order in which they are written."""

from .recipe import Compound, is_compound, read, restored
from .steps import Step

__all__ = ["Compound", "Step", "is_compound", "read", "restored"]
