"""The layer-wise Hessian ``H = X X^T`` and what is computed from it once for all layers that share an input."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NumericalError
from ..select import is_finite
from ..symmetric import invert_upper, quadratic


class Curvature:
    """The Gram matrix of a layer's input with its factorizations, cached.

    Layers that read the same tensor (query, key and value; gate and up) share one object, so that the
    Gram matrix is summed once and factorized once.

    Args:
        gram: ``(i, i)`` float32, the sum over tokens of ``x x^T``.
        name: where it comes from, for messages.
    """

    def __init__(self, gram: Tensor, name: str = "the layer") -> None:
        if not is_finite(gram):
            raise NumericalError(f"the input of {name} is NaN or infinite on the calibration data")
        self.gram = gram
        self.name = name
        self.notes: list[str] = []
        self._factors: dict[float, Tensor] = {}
        self._eigh: tuple[Tensor, Tensor] | None = None

    @property
    def size(self) -> int:
        return int(self.gram.shape[0])

    @property
    def dead(self) -> Tensor:
        """Input features that were always zero: their weights do nothing and may go."""
        return self.gram.diagonal() == 0

    def damped(self, damp: float) -> Tensor:
        """``H + damp * mean(diag H) I``, with ones on the diagonal of dead features; a fresh tensor."""
        h = self.gram.clone()
        diagonal = h.diagonal()
        mean = float(diagonal.double().mean())
        diagonal[self.dead] = 1.0 if mean == 0 else mean
        diagonal += damp * mean
        return h

    def inverse_factor(self, damp: float) -> Tensor:
        """Upper Cholesky factor ``U`` of the inverse: ``H^-1 = U^T U``, float32 ``(i, i)``.

        When ``H + damp`` is not positive definite in float32, it is factorized in float64, and then the
        damping grows tenfold until it is; each step is noted in ``notes``, never taken in silence.

        Raises:
            NumericalError: no damping up to the mean of the diagonal makes it positive definite.
        """
        if damp in self._factors:
            return self._factors[damp]
        trial, dtype = damp, torch.float32
        while True:
            h = self.damped(trial)
            factor = _inverse_factor(h.to(dtype))
            if factor is not None:
                break
            if dtype is torch.float32:
                dtype = torch.float64
                continue
            trial = max(trial, 1e-4) * 10
            if trial > 1.0:
                raise NumericalError(
                    f"the Hessian of {self.name} is not positive definite at any damping up to its mean; "
                    "use more or other calibration data"
                )
        if trial != damp:
            self.notes.append(f"Hessian not positive definite at damping {damp:g}; solved with {trial:g}")
        elif dtype is torch.float64:
            self.notes.append("Hessian factorized in float64: float32 was not enough")
        self._factors[damp] = factor.float()
        return self._factors[damp]

    def eigh(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (ascending) and eigenvectors of the symmetrically scaled ``D^-1/2 H D^-1/2``, float32."""
        if self._eigh is None:
            scale = self.gram.diagonal().clamp_min(1e-30).rsqrt()
            scaled = self.gram * scale * scale[:, None]
            values, vectors = torch.linalg.eigh(scaled)
            self._eigh = (values, vectors)
        return self._eigh


def _inverse_factor(h: Tensor) -> Tensor | None:
    """``U`` with ``h^-1 = U^T U``: factorize ``h = R R^T`` from its last row upwards, then ``U = R^-1``."""
    lower, info = torch.linalg.cholesky_ex(h.flip(0, 1))
    if int(info):
        return None
    upper = invert_upper(lower.flip(0, 1))
    return upper if is_finite(upper) else None


def output_error(weight: Tensor, pruned: Tensor, gram: Tensor) -> float:
    """Relative output error ``||(W - W') X||^2 / ||W X||^2`` from the Gram matrix."""
    change = (weight - pruned).float()
    lost, whole = quadratic(change, gram), quadratic(weight.float(), gram)
    return max(lost, 0.0) / whole if whole > 0 else 0.0
