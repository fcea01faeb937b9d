"""Statistics of weight gradients, streamed over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import DataError, ModelError, NumericalError, RecipeError
from ..facts import of_source
from ..layers import Layer, axis_sums

#: What a criterion or solver may name, and what it is.
GRADIENT_FACTS = of_source("gradients")

Loss = Callable[[nn.Module, Any], Tensor]

#: Vectors ``v`` of a Hessian product by the id of a parameter, without end; parameters that are absent have zeros.
Directions = Iterator[Mapping[int, Tensor]]

#: Of parameters whose gradient is not constant: ``v``, and what ``H v`` is multiplied by.
_Draw = Callable[[Mapping[int, Tensor]], tuple[Mapping[int, Tensor], ...]]

_CHUNK = 2048  # blocks of the Fisher that are inverted at a time, in float64


class GradientEvidence:
    """Running statistics of the gradient of one layer's weight.

    ``update`` takes the gradient of one batch; ``merge`` of two is the evidence of both lists of batches
    together. The Fisher is that of batches: give batches of one example for the textbook's.

    For ``fisher_inverse`` and ``fisher_blocks`` the blocks of ``sum g g^T`` are kept, and inverted when asked
    for. That is the matrix which WoodFisher's rank-one recursion arrives at, at the same cost in memory, but the
    number of batches need not be known before, it merges, and rounding errors do not build up.

    Args:
        shape: ``(o, i)``.
        needs: which of `GRADIENT_FACTS` to keep.
        device: where.
        block: weights in a block of the Fisher, consecutive in row-major order.
        damp: what is added to the diagonal of the Fisher before it is inverted.
        name: the layer, for messages.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        needs: Iterable[str],
        device: torch.device | None = None,
        *,
        block: int = 50,
        damp: float = 1e-5,
        name: str = "the layer",
    ) -> None:
        self.shape = shape
        self.needs = frozenset(needs)
        self.block, self.damp, self.name = block, damp, name
        self.batches = 0
        self.probes = 0

        def zeros(*size: int) -> Tensor:
            return torch.zeros(*size, device=device)

        blocks = -(-shape[0] * shape[1] // block)
        self._sum = zeros(*shape) if "gradient" in self.needs else None
        self._square = zeros(*shape) if "fisher" in self.needs else None
        self._outer = zeros(blocks, block, block) if self.needs & {"fisher_inverse", "fisher_blocks"} else None
        self._curve = zeros(*shape) if "hessian" in self.needs else None
        self._lines: dict[str, dict[int, list[Tensor]]] = {}

    def update(self, gradient_oi: Tensor) -> None:
        """Add the gradient of one batch."""
        g = gradient_oi.detach().float()
        self.batches += 1
        if self._sum is not None:
            self._sum += g
        if self._square is not None:
            self._square.addcmul_(g, g)
        if self._outer is not None:
            flat = g.reshape(-1)
            flat = torch.nn.functional.pad(flat, (0, self._outer.shape[0] * self.block - flat.numel()))
            g_pb = flat.view(-1, self.block)
            self._outer.baddbmm_(g_pb[:, :, None], g_pb[:, None, :])

    def update_lines(self, fact: str, stored: Tensor) -> None:
        """Add a row to a fact of units: a tensor of the stored shape, of which only sums along each axis are kept."""
        if fact in self.needs:
            for axis, line in axis_sums(stored).items():
                self._lines.setdefault(fact, {}).setdefault(axis, []).append(line.cpu())

    def update_hessian(self, sample_oi: Tensor) -> None:
        """Add one sample ``v * (H v)`` of the Hessian's diagonal, ``v`` of random signs."""
        self.probes += 1
        if self._curve is not None:
            self._curve += sample_oi.detach().float()

    def merge(self, other: GradientEvidence) -> None:
        """Take in what another worker saw."""
        self.batches += other.batches
        self.probes += other.probes
        for name in ("_sum", "_square", "_outer", "_curve"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not None:
                mine += theirs.to(mine.device)
        for fact, axes in other._lines.items():
            for axis, lines in axes.items():
                self._lines.setdefault(fact, {}).setdefault(axis, []).extend(lines)

    def __getitem__(self, fact: str) -> Any:
        """One of `GRADIENT_FACTS`; of those of units this layer's part: stored axis -> ``(rows, n)``."""
        if fact in self._lines:
            rows = {axis: torch.stack(lines) for axis, lines in self._lines[fact].items()}
            return {a: x.mean(0, keepdim=True) for a, x in rows.items()} if fact == "unit_trace" else rows
        if fact == "gradient" and self._sum is not None:
            return self._sum / max(self.batches, 1)
        if fact == "fisher" and self._square is not None:
            return self._square / max(self.batches, 1)
        if fact == "hessian" and self._curve is not None:
            return self._curve / max(self.probes, 1)
        if fact == "fisher_inverse" and self._outer is not None:
            diagonal = torch.cat([x.diagonal(dim1=1, dim2=2).reshape(-1).float() for x in self._inverses()])
            return diagonal[: self.shape[0] * self.shape[1]].reshape(self.shape)
        if fact == "fisher_blocks" and self._outer is not None:
            return torch.cat(list(self._damped()))
        raise KeyError(fact)

    def inverse_blocks(self) -> Tensor:
        """Blocks of the inverse Fisher, ``(blocks, block, block)``; the last is padded with ``1 / damp``."""
        return torch.cat([x.float() for x in self._inverses()])

    def _inverses(self) -> Iterator[Tensor]:
        for fisher in self._damped():
            lower, info = torch.linalg.cholesky_ex(fisher)
            if int(info.max()):
                raise NumericalError(
                    f"the Fisher of {self.name} cannot be inverted with damping {self.damp:g}: "
                    "its gradients are too large; scale the loss down"
                )
            yield torch.cholesky_inverse(lower)

    def _damped(self) -> Iterator[Tensor]:
        """Blocks of the damped Fisher, some at a time, in float64."""
        if self._outer is None:
            raise KeyError("fisher_blocks")
        for part in self._outer.split(_CHUNK):
            fisher = part.double() / max(self.batches, 1)
            fisher.diagonal(dim1=1, dim2=2).add_(self.damp)
            yield fisher

    def check_finite(self, name: str) -> None:
        """Raise `NumericalError` naming the layer when a gradient was NaN or infinite."""
        lines = [line for axes in self._lines.values() for some in axes.values() for line in some]
        for tensor in (self._sum, self._square, self._outer, self._curve, *lines):
            if tensor is not None and not torch.isfinite(tensor).all():
                raise NumericalError(
                    f"the gradient of {name} is NaN or infinite on the calibration data; "
                    "check the loss, the model in its dtype and the data"
                )


def gather_gradients(
    model: nn.Module,
    layers: Sequence[Layer],
    needs: Iterable[str],
    batches: Iterable[Any],
    loss: Loss,
    *,
    generator: torch.Generator | None = None,
    probes: int = 4,
    directions: Directions | None = None,
    fisher_block: int = 50,
    fisher_damp: float = 1e-5,
) -> dict[str, GradientEvidence]:
    """Backpropagate ``loss(model, batch)`` for every batch and gather evidence of all ``layers`` at once.

    The model runs in the mode it is in (training or evaluation). Modes, ``requires_grad`` flags and, in
    training mode, buffers such as batch-norm statistics are afterwards what they were; ``.grad`` is never
    touched. Only the pruned parameters require a gradient meanwhile.

    Args:
        model: any module.
        layers: what to gather for.
        needs: facts; those not in `GRADIENT_FACTS` are ignored.
        batches: what ``loss`` takes.
        loss: ``loss(model, batch)`` returns a tensor of one element.
        generator: draws the signs for ``hessian``; without one, a fresh generator seeded with 0.
        probes: draws for each batch; the estimate's variance falls with ``probes * batches``.
        directions: for ``unit_curvature``: what ``H`` is multiplied by, ``probes`` of them for each batch. Kept is
            ``w * (H v)``, summed along each axis.
        fisher_block, fisher_damp: ``block`` and ``damp`` of `GradientEvidence`.

    Raises:
        RecipeError: fewer than one probe, or blocks or damping of nothing.
        DataError: there are no batches, or the loss is not one number.
        ModelError: a layer received no gradient from any batch (an expert that no token chose has zeros).
        NumericalError: a gradient is NaN or infinite.
    """
    needs = frozenset(needs) & GRADIENT_FACTS.keys()
    estimated = bool(needs & {"hessian", "unit_trace"})
    curved = estimated or "unit_curvature" in needs
    if curved and probes < 1:
        raise RecipeError(f"curvature is estimated with at least one probe, not {probes}")
    if fisher_block < 1 or not fisher_damp > 0:
        raise RecipeError(
            f"blocks of the Fisher have at least one weight and a damping above 0, not {fisher_block} and "
            f"{fisher_damp:g}"
        )
    generator = generator or torch.Generator().manual_seed(0)
    blocks: dict[str, Any] = {"block": fisher_block, "damp": fisher_damp}
    found = {x.name: GradientEvidence(x.shape, needs, x.stored.device, name=x.name, **blocks) for x in layers}
    # Experts are slices of one parameter: differentiate with respect to each parameter once.
    parameters = {id(p): p for p in (getattr(x.module, x.parameter) for x in layers)}
    reached: set[int] = set()
    # The fused attention kernels have no second derivative.
    attention = sdpa_kernel(SDPBackend.MATH) if curved else nullcontext()
    with _left_alone(model, list(parameters.values())), torch.enable_grad(), attention:
        for batch in batches:
            draws: list[_Draw] = [partial(_hutchinson, generator)] * (probes if estimated else 0)
            along: list[_Draw] = []
            if "unit_curvature" in needs:
                assert directions is not None
                along = [partial(_along, parameters, directions)] * probes
            gradients, samples = _differentiate(loss(model, batch), parameters, [*draws, *along])
            reached |= gradients.keys()
            for layer in layers:
                key, evidence = id(getattr(layer.module, layer.parameter)), found[layer.name]
                evidence.update(_part(layer, gradients.get(key)))
                if "unit_change" in needs and layer.index is None:  # stacked experts are not scored by units
                    change = gradients.get(key, torch.zeros_like(layer.stored)).double()
                    evidence.update_lines("unit_change", layer.stored.detach().double() * change)
            for place, sample in enumerate(samples):  # one at a time: each is as large as the model
                for layer in layers:
                    key, evidence = id(getattr(layer.module, layer.parameter)), found[layer.name]
                    if place < len(draws):
                        evidence.update_hessian(_part(layer, sample.get(key)))
                    if layer.index is None:
                        fact = "unit_trace" if place < len(draws) else "unit_curvature"
                        part = sample.get(key) if fact in needs else None
                        if fact in needs:
                            evidence.update_lines(fact, torch.zeros_like(layer.stored) if part is None else part)
    if found and not any(x.batches for x in found.values()):
        raise DataError("there are no batches to take gradients of; give calibration data")
    for layer in layers:
        if layer.index is None and id(getattr(layer.module, layer.parameter)) not in reached:
            raise ModelError(
                f"{layer.name} received no gradient from any batch: the loss does not depend on it; "
                f"give more data, or skip it with --skip {layer.name}"
            )
    for name, evidence in found.items():
        evidence.check_finite(name)
    return found


def _differentiate(
    value: Tensor, parameters: dict[int, Tensor], draws: Sequence[_Draw]
) -> tuple[dict[int, Tensor], Iterator[dict[int, Tensor]]]:
    """Gradients by parameter id, and a sample for each draw of ``v`` and ``u``: ``u * (H v)``.

    What is not reached is absent.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise DataError("the loss of a batch must be a tensor of one element; average it over the batch")
    gradients: dict[int, Tensor] = {}
    if value.requires_grad:
        raw = torch.autograd.grad(value.sum(), list(parameters.values()), create_graph=bool(draws), allow_unused=True)
        gradients = {k: g for k, g in zip(parameters, raw, strict=True) if g is not None}
    return gradients, _products(gradients, parameters, draws)


def _products(
    gradients: Mapping[int, Tensor], parameters: Mapping[int, Tensor], draws: Sequence[_Draw]
) -> Iterator[dict[int, Tensor]]:
    # A constant gradient (the loss is linear in that weight) has no graph, and adds nothing to H.
    bent = {k: g for k, g in gradients.items() if g.requires_grad}
    for draw in draws:
        v, u = draw(bent)
        products: Sequence[Tensor | None] = ()
        if bent:
            products = torch.autograd.grad(
                list(bent.values()),
                [parameters[k] for k in bent],
                [v[k] for k in bent],
                retain_graph=True,
                allow_unused=True,
            )
        yield {k: u[k].detach() * hv for k, hv in zip(bent, products, strict=True) if hv is not None}


def _hutchinson(generator: torch.Generator, bent: Mapping[int, Tensor]) -> tuple[Mapping[int, Tensor], ...]:
    """The same random signs twice: the expectation of ``v * (H v)`` is the diagonal."""
    signs = {k: _signs(g, generator) for k, g in bent.items()}
    return signs, signs


def _along(
    parameters: Mapping[int, Tensor], directions: Directions, bent: Mapping[int, Tensor]
) -> tuple[Mapping[int, Tensor], ...]:
    """The next direction, and the weights themselves."""
    v = next(directions)
    return {k: v[k].to(g) if k in v else torch.zeros_like(g) for k, g in bent.items()}, parameters


def _signs(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else None
    bits = torch.randint(0, 2, like.shape, generator=generator, device=device)
    return (bits * 2 - 1).to(like)


def _part(layer: Layer, whole: Tensor | None) -> Tensor:
    """The layer's ``(o, i)`` part of a gradient of its parameter; zeros where there is none."""
    if whole is None:
        return torch.zeros(layer.shape, device=layer.stored.device)
    return layer.to_oi((whole if layer.index is None else whole[layer.index]).detach())


@contextmanager
def _left_alone(model: nn.Module, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Only ``parameters`` require a gradient inside; modes, flags and buffers are put back, come what may."""
    modes = [(m, m.training) for m in model.modules()]
    flags = [(p, p.requires_grad) for p in [*model.parameters(), *parameters]]
    moving = any(training for _, training in modes)
    buffers = [(m, key, b, b.clone()) for m, _ in modes if moving for key, b in m._buffers.items() if b is not None]
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for module, key, buffer, value in buffers:
                buffer.copy_(value)
                module._buffers[key] = buffer
