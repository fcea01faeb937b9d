"""A plan that takes whole pieces out of a model: blocks, or experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from ..errors import ModelError
from ..graph.state import duplicate
from ..recipe import Recipe
from ..surgery.factors import carried
from ..surgery.pieces import Pieces, member
from ..surgery.prove import Proof
from .plan import asked, described, header, proof_line
from .stock import stock_config
from .targets import Target

#: Path of a place -> number of a piece there.
Piece = tuple[str, int]


@dataclass(eq=False)
class WholePlan:
    """Which pieces would be taken out of a model, with the proof. Prints as a table; nothing is changed before `run`.

    Attributes:
        scores: piece -> what it is worth; of those that may go.
        left: piece, or place with number -1 -> why it may not.
        removed: place -> numbers of those that go.
        before, after: parameters, bytes of them, and FLOPs of one forward pass of the example.
        proof: that the model with these pieces masked and the one without them compute the same.
    """

    model: nn.Module
    recipe: Recipe
    target: Target
    pieces: Pieces = field(repr=False)
    scores: dict[Piece, float]
    left: dict[Piece, str]
    removed: dict[str, list[int]]
    before: dict[str, int]
    after: dict[str, int]
    proof: Proof
    notes: list[str]
    example: tuple[tuple[Any, ...], dict[str, Any]] = field(repr=False)

    @property
    def proven(self) -> bool:
        return self.proof.proven and bool(self.removed)

    def mask(self) -> nn.Module:
        """Set every parameter of the pieces that go to zero, in place: their place in the model is then empty.

        Raises:
            ModelError: zeros do not stand for the absence of such a piece.
        """
        if self.pieces.empty is None:
            raise ModelError(f"an {self.pieces.name} whose parameters are zero is still there: use shrink()")
        self.pieces.empty(self.model, self.removed)
        return self.model

    def shrink(self) -> nn.Module:
        """A copy of the model without these pieces. The model itself stays as it is.

        Raises:
            ModelError: none can be taken out.
        """
        if not self.removed:
            raise ModelError(f"no {self.pieces.name} can be taken out: " + "; ".join(self.notes or ["none may go"]))
        small = duplicate(self.model)
        self.pieces.remove(small, self.removed)
        surgery = self._describe() | carried(self.model)
        if stock_config(small, self._sizes(), *self.example):
            surgery["format"] = "transformers"
        small.secateur_surgery = surgery  # type: ignore[assignment]
        return small

    run = shrink

    @cached_property
    def _places(self) -> dict[str, int]:
        return self.pieces.places(self.model)

    def _sizes(self) -> dict[int, list[int]]:
        """Numbers of pieces and what they become, where that is the same everywhere."""
        found: dict[int, list[int]] = {}
        for path, gone in self.removed.items():
            count = self._places[path]
            left = found.setdefault(count, [])
            left += [n for n in (count - len(gone),) if n not in left]
        return found

    def _describe(self) -> dict[str, Any]:
        return {
            **described(self.recipe, self.target, self.before, self.after, self.proof.error, self.example),
            "kept": {},
            "mends": [],
            self.pieces.key: {p: {"of": self._places[p], "gone": gone} for p, gone in self.removed.items()},
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            **asked(self.recipe, self.target, self.before, self.after),
            f"{self.pieces.name}s": [
                {"name": member(p, k), "score": s, "goes": k in self.removed.get(p, ())}
                for (p, k), s in self.scores.items()
            ],
            "left": [{"name": _name(piece), "reason": why} for piece, why in self.left.items()],
            "removed": self.removed,
            "proof": {"proven": self.proven, "error": self.proof.error},
            "notes": self.notes,
        }

    def _each(self) -> Iterator[str]:
        for (path, k), score in self.scores.items():
            goes = "goes" if k in self.removed.get(path, ()) else ""
            yield f"  {member(path, k):60} {score:<12.5g} {goes}".rstrip()

    def _by_place(self) -> Iterator[str]:
        for place in dict.fromkeys(path for path, _ in self.scores):
            gone = self.removed.get(place, [])
            worth = [score for (path, _), score in self.scores.items() if path == place]
            which = ", ".join(map(str, gone[:12])) + (", ..." if len(gone) > 12 else "")
            what = f"{len(gone)} of {self._places[place]} go: {which}" if gone else f"all {self._places[place]} stay"
            yield f"  {place:60} {f'{min(worth):.4g} to {max(worth):.4g}':24} {what}"

    def __str__(self) -> str:
        lines = header(self.recipe, self.target, self.before, self.after)
        lines += self._each() if len({path for path, _ in self.scores}) == 1 else self._by_place()
        lines += [f"  {_name(piece):60} left alone: {why}" for piece, why in self.left.items()]
        lines += proof_line(self.proven, self.proof.error)
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def _name(piece: Piece) -> str:
    path, k = piece
    return path if k < 0 else member(path, k)


def totals(model: nn.Module, work: int) -> dict[str, int]:
    """Parameters, FLOPs of one forward pass as they were counted, and bytes of the parameters."""
    return {
        "params": sum(p.numel() for p in model.parameters()),
        "flops": work,
        "bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
    }
