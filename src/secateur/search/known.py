"""A search whose best is known in closed form, for checks of strategies."""

from __future__ import annotations

from collections.abc import Callable

from .space import Counts, Node, Space


def known_optimum() -> tuple[Space, Callable[[Counts], float], float]:
    """A space of six layers, a value of counts in it, and the highest value that any keeps could have.

    A layer costs ``a / keep``; with the sum of ``size * keep`` given, the sum of costs is least where keeps are
    proportional to ``sqrt(a / size)``, by Cauchy and Schwarz.
    """
    units, sensitivity = (400, 900, 100, 1600, 400, 600), (4.0, 1.0, 2.0, 1.0, 0.2, 3.0)
    facts = [{"flops": float(u), "outputs": a} for u, a in zip(units, sensitivity, strict=True)]
    nodes = tuple(Node(f"layer{i}", u, range(1, u + 1), f) for i, (u, f) in enumerate(zip(units, facts, strict=True)))
    limit = 1000.0
    edges = [(i, i + 1) for i in range(len(nodes) - 1)]
    space = Space(nodes, lambda counts: float(sum(counts)), limit, (1.0,) * len(nodes), lambda: edges)

    def value(counts: Counts) -> float:
        return -sum(a * u / c for a, u, c in zip(sensitivity, units, counts, strict=True))

    best = -(sum((a * u) ** 0.5 for a, u in zip(sensitivity, units, strict=True)) ** 2) / limit
    return space, value, best
