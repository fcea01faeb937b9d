"""A teacher that is stored: of each example its largest logits, and how much probability all others have together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import DataError, RecipeError

#: What is kept of one example: the largest logits, which they are, and what all others come to at a temperature:
#: the log of the sum of their exponentials, which is minus infinity where there are none.
Lesson = tuple[Tensor, Tensor, Tensor]


class Stored:
    """The outputs of a teacher by example, each computed once.

    Args:
        top: logits that are kept at each position.
        temperature: at which probabilities will be compared.
    """

    def __init__(self, top: int, temperature: float) -> None:
        if isinstance(top, bool) or not isinstance(top, int) or top < 1:
            raise RecipeError(f"a stored teacher keeps a whole number of logits, at least 1, not {top!r}")
        self.top, self.temperature = top, temperature
        self._lessons: dict[str, Lesson] = {}

    def __len__(self) -> int:
        return len(self._lessons)

    @staticmethod
    def of(
        teacher: nn.Module, batches: Iterable[Any], logits: Callable[[nn.Module, Any], Tensor], top: int,
        temperature: float,
    ) -> Stored:  # fmt: skip
        """What a teacher says of batches, so that it need not be at hand later.

        Args:
            logits: ``logits(model, batch)``, with an example in each row.
        """
        made = Stored(top, temperature)
        with torch.no_grad():
            for batch in batches:
                made.add(batch, logits(teacher, batch))
        return made

    def add(self, batch: Any, logits: Tensor) -> None:
        """Keep what a teacher said of a batch."""
        largest = logits.float().topk(min(self.top, logits.shape[-1]), dim=-1)
        rest = _others(logits.float() / self.temperature, largest.indices)
        names = rows_of(batch)
        if len(names) != len(logits):
            raise DataError(f"a batch has {len(names)} examples, and the teacher answered {len(logits)}")
        for k, name in enumerate(names):
            self._lessons[name] = (
                largest.values[k].detach().cpu().clone(), largest.indices[k].to(torch.int32).cpu(),
                rest[k].detach().cpu().clone(),
            )  # fmt: skip

    def look(self, batch: Any) -> Lesson | None:
        """What is known of a batch; None where an example was not seen."""
        names = rows_of(batch)
        if not names or any(name not in self._lessons for name in names):
            return None
        found = [self._lessons[name] for name in names]
        values, indices, rest = (torch.stack([one[k] for one in found]) for k in range(3))
        return values, indices, rest

    def loss(self, student: Tensor, lesson: Lesson) -> Tensor:
        """``T^2 KL`` between what both say of the teacher's top classes, and of all others as one class.

        Equal to the divergence over all classes where all are kept, and never above it.
        """
        values, indices, rest = (x.to(student.device) for x in lesson)
        scaled, which = student.float() / self.temperature, indices.long()
        own, taught = scaled.log_softmax(-1).gather(-1, which), values / self.temperature
        total = torch.logaddexp(taught.logsumexp(-1), rest)
        taught = taught - total[..., None]
        whole = (taught.exp() * (taught - own)).sum(-1)
        if indices.shape[-1] < student.shape[-1]:
            left = rest - total
            whole = whole + left.exp() * (left - _others(scaled, which) + scaled.logsumexp(-1))
        return self.temperature**2 * whole.mean()

    def save(self, file: Path) -> None:
        """Write a safetensors file."""
        state: dict[str, Tensor] = {}
        for name, (values, indices, rest) in self._lessons.items():
            state |= {f"{name}.values": values, f"{name}.indices": indices, f"{name}.rest": rest}
        meta = {"top": str(self.top), "temperature": repr(self.temperature)}
        part = file.with_name(f".{file.name}.tmp")
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, part, metadata=meta)
        part.replace(file)

    @staticmethod
    def load(file: Path) -> Stored:
        """The inverse of `save`.

        Raises:
            DataError: the file is no such.
        """
        try:
            with safe_open(file, framework="pt") as f:
                meta = f.metadata() or {}
                made = Stored(int(meta["top"]), float(meta["temperature"]))
                for name in {key.rpartition(".")[0] for key in f.keys()}:  # noqa: SIM118
                    values, indices, rest = (f.get_tensor(f"{name}.{p}") for p in ("values", "indices", "rest"))
                    made._lessons[name] = (values, indices, rest)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise DataError(f"{file} is not a stored teacher: {error}") from None
        return made


def _others(logits: Tensor, indices: Tensor) -> Tensor:
    """The log of the sum of the exponentials of all logits but these: no difference of two nearly equal sums."""
    return logits.scatter(-1, indices, -torch.inf).logsumexp(-1)


def rows_of(batch: Any) -> list[str]:
    """A name for each example of a batch, by its inputs: the first tensor of the batch."""
    first = next((x for x in tree_leaves(batch) if isinstance(x, Tensor)), None)
    if first is None or first.dim() == 0:
        return []
    flat = first.detach().cpu().contiguous()
    return [hashlib.sha256(row.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()[:24] for row in flat]
