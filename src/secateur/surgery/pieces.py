"""Whole pieces of a model, such as blocks and experts: what there is of a kind, and how some are taken out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .prove import Proof, distance, first_line, twin

#: A place by its path -> numbers of the pieces there that go.
Removed = Mapping[str, Sequence[int]]


def member(path: str, name: int | str) -> str:
    """The path of what a place holds; the place may be the model itself."""
    return f"{path}.{name}" if path else str(name)


@dataclass(frozen=True)
class Pieces:
    """One kind of piece.

    Attributes:
        name: of one.
        key: under which a surgery plan lists those that go.
        places: the places of a model by their paths, and how many are there.
        remove: takes pieces out of a model, in place.
        empty: leaves nothing in their place, in place; None where parameters cannot say so.
    """

    name: str
    key: str
    places: Callable[[nn.Module], dict[str, int]]
    remove: Callable[[nn.Module, Removed], None]
    empty: Callable[[nn.Module, Removed], None] | None

    def without(self, model: nn.Module, removed: Removed) -> nn.Module:
        """A copy without these pieces that shares the tensors of the others."""
        copy = twin(model)
        self.remove(copy, removed)
        return copy


#: In float64. Where a model computes in float32 whatever it is given, sums of another length differ by more.
EXACT, ROUNDED = 1e-9, 2e-5


def compare(
    masked: Callable[[], list[Tensor]], small: Callable[[], list[Tensor]], tolerance: Callable[[], float]
) -> Proof:
    """Whether two runs agree; ``tolerance`` is asked after both."""
    try:
        wanted, got = masked(), small()
    except Exception as problem:  # the model's own code
        return Proof(False, None, 0.0, (), f"{type(problem).__name__}: {first_line(problem)}")
    scale = max((float(x.abs().max()) for x in wanted if x.numel()), default=0.0) or 1.0
    error = distance(got, wanted, scale)
    if error is not None and error <= tolerance():
        return Proof(True, error, 0.0, ())
    why = (
        "its outputs have other shapes" if error is None else f"the model computes something else (off by {error:.1e})"
    )
    return Proof(False, error, 0.0, (), why)
