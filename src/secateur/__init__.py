"""secateur: prune neural networks, compare pruning methods, and measure what it brings."""

from __future__ import annotations

from .compare import Study, compare, write_report
from .compound import Compound
from .compression import compress
from .directory import plan, prune_directory
from .errors import SecateurError
from .files import load, save
from .fuse import Decomposed, decompose
from .masks import Masks
from .methods import all_methods as list_methods
from .methods import explain
from .methods import load as _register
from .prune import prune
from .pruned import Pruned
from .quality import measure
from .recipe import Recipe
from .recommend import Situation, recommend
from .search import Found, dhp, metapruning, search
from .structured import StructuredPlan
from .tasks import Task
from .when import Session, Trained, attach, train

_register()

__version__ = "0.1.0"

__all__ = [
    "Compound",
    "Decomposed",
    "Found",
    "Masks",
    "Pruned",
    "Recipe",
    "SecateurError",
    "Session",
    "Situation",
    "StructuredPlan",
    "Study",
    "Task",
    "Trained",
    "attach",
    "compare",
    "compress",
    "decompose",
    "dhp",
    "explain",
    "list_methods",
    "load",
    "measure",
    "metapruning",
    "plan",
    "prune",
    "prune_directory",
    "recommend",
    "save",
    "search",
    "train",
    "write_report",
]
