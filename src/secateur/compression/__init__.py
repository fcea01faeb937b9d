"""Real speed from zeros: layers packed for the kernels that win on this machine."""

from .choose import Choice
from .dense import DenseLinear
from .gpu_layers import GpuLinear, SemiLinear
from .int4 import Int4Linear
from .make import Compression, compress
from .modules import Installed, Sparse, SparseConv2d, SparseLinear
from .store import dense_again, is_compressed, load_compressed, save_compressed

__all__ = [
    "Choice",
    "Compression",
    "DenseLinear",
    "GpuLinear",
    "Installed",
    "Int4Linear",
    "SemiLinear",
    "Sparse",
    "SparseConv2d",
    "SparseLinear",
    "compress",
    "dense_again",
    "is_compressed",
    "load_compressed",
    "save_compressed",
]
