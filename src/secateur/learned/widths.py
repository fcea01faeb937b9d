"""A width that is learned: how many units of a pool stay, as a distribution over a few sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import RecipeError
from ..registry import register
from .base import Gate, Now, Values

#: Shares of the units that a width may be.
_SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
#: By how much scores of the best and the last unit of a pool differ where a width says the same of both.
_TIE = 1e-4
#: Of a draw whose logarithm is taken: zeros are possible.
_TINY = 1e-30


def sizes_of(units: int) -> list[int]:
    """The widths that a pool of so many units may have.

    >>> sizes_of(16), sizes_of(2)
    ([4, 6, 8, 9, 11, 12, 14, 16], [1, 2])
    """
    return sorted({max(1, int(units * share + 1e-9)) for share in _SHARES})


@register("gate", family="stochastic", paper="1905.09717", units=True, mixes=True, survey=("B2.4", "D3"))
def tas(
    weight: Tensor, pool_shape: tuple[int, int], generator: torch.Generator, *, hot: float = 10.0, cold: float = 0.1,
    lr: float | None = 0.1,
) -> Gate:  # fmt: skip
    """A distribution over widths: in each step two of them are drawn, and the layer is their weighted mixture.

    :: p = softmax((log softmax(a) + g) / tau), g Gumbel;  z_u = sum over the two drawn k of p_k [rank(u) < c_k]

    Widths c are 30, 40, ..., 100 % of the units; the units whose weights are largest at the start stay, by their norm.
    The temperature tau falls from ``hot`` to ``cold``. A unit's score is the probability that the width reaches it,
    the expected density the mean of the widths.

    Choose it to learn how wide each layer is to be, not which units it has.

    Beware: weights and widths learn from the same batches, at a rate of their own for the widths (``lr``).

    >>> gate = tas(torch.ones(10, 1), (1, 10), torch.Generator())
    >>> even = {"width": torch.zeros(1, 8)}  # the mean of 0.3, 0.4, ..., 1.0
    >>> round(float(gate.density(torch.ones(10, 1), even, {}).mean()), 4)
    0.65

    Source: Dong and Yang, Network pruning via transformable architecture search, arXiv 1905.09717, section 3, and the
    official code (D-X-Y/AutoDL-Projects): the shares, two widths drawn without replacement by the noisy softmax and
    weighted by it among themselves, the first values, and tau in straight lines as in the paper (the code: half a
    cosine from 5). Not as there: a narrower feature map is averaged along its channels to the size of the wider one,
    behind a batch norm of its own for each width; here units keep their places and the narrower width has zeros, since
    the weights stay, where the paper trains new ones. The first filters stay there, here the largest. Widths learn
    there from half of the data, which weights do not see, by Adam at 0.001; their cost is twice the log of the expected
    FLOPs while the likeliest network is above the target, minus that while it is below by more than 5 % of the whole,
    and nothing between (here what the recipe says: lagrangian). Depths, which the code mixes in the same way from the
    outputs of a stage's blocks, are not searched: supernet does.
    """
    pools, units = pool_shape
    if pools != 1 or len(weight) != units:
        raise RecipeError("gate 'tas' learns how many units stay: choose granularity row, coupled, filter or channel")
    if not hot >= cold > 0:
        raise RecipeError(f"gate 'tas': the temperature falls from hot to cold, above 0: not {hot:g} to {cold:g}")
    sizes = sizes_of(units)
    order = weight.detach().flatten(1).float().norm(dim=1).argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(units, device=order.device)
    counts = torch.tensor(sizes, device=rank.device)
    table = (rank < counts[:, None]).float()  # (widths, units)
    shares = counts.float() / units
    first = torch.empty(1, len(sizes), device=generator.device)
    first.normal_(0.0, 0.01, generator=generator)

    def settle(w: Tensor, learned: Values, now: Now) -> dict[str, Tensor]:
        logits = learned["width"].detach()
        gumbel = -torch.empty_like(logits).exponential_(generator=now.generator).clamp_min_(_TINY).log()
        tau = hot + (cold - hot) * min(1.0, now.progress)
        p = ((logits.log_softmax(-1) + gumbel) / tau).softmax(-1)
        drawn = torch.multinomial(p + 1e-7, min(2, len(sizes)), generator=now.generator)
        return {"gumbel": gumbel, "drawn": drawn, "tau": torch.full_like(logits[0, :1], tau)}

    def factor(learned: Values, fixed: Values, training: bool) -> Tensor:
        logits = learned["width"]
        rows = table.to(logits)
        if not training:
            return rows[logits.argmax(-1)]
        both = ((logits.log_softmax(-1) + fixed["gumbel"]) / fixed["tau"]).gather(1, fixed["drawn"]).softmax(-1)
        return both @ rows[fixed["drawn"][0]]

    def density(w: Tensor, learned: Values, fixed: Values) -> Tensor:
        return learned["width"].softmax(-1) @ shares.to(learned["width"])

    def score(w: Tensor, learned: Values) -> Tensor:
        reached = learned["width"].softmax(-1) @ table.to(learned["width"])
        return reached - _TIE * rank.to(reached) / units

    return Gate(factor=factor, score=score, learned={"width": first}, settle=settle, density=density, lr=lr)
