"""Architecture search as pruning: all sub-networks of a model are trained at once, and the best one is taken out."""

from .elastic import Elastic
from .sandwich import sandwich
from .shrinking import supernet
from .subnet import SubNetwork, Supernet
from .train import train_supernet

__all__ = ["Elastic", "SubNetwork", "Supernet", "sandwich", "supernet", "train_supernet"]
