"""Physical removal: smaller tensors, the sizes that modules repeat, and the proof that nothing else changed."""

from .prove import Proof, prove
from .shrink import shrink

__all__ = ["Proof", "prove", "shrink"]
