"""Tasks: a model, data, a loss and a metric, ready ones and the user's; and the loop that trains them."""

from __future__ import annotations

from . import images, text  # noqa: F401  registers them
from .base import Task, as_task, find, names_a_task
from .checkpoint import Checkpoint
from .loop import Fitted, Live, fit

__all__ = ["Checkpoint", "Fitted", "Live", "Task", "as_task", "find", "fit", "names_a_task"]
