"""Criteria that look at the weights alone."""

from __future__ import annotations

from torch import Tensor

from ..registry import register


@register("criterion", family="magnitude", paper="1506.02626")
def magnitude(weight: Tensor, *, p: float = 1.0) -> Tensor:
    """The size of a weight.

    :: s = |w|^p

    Choose it for a data-free baseline, and before long fine-tuning, where it is hard to beat.

    Beware: in one shot it breaks language models from about 50 % on.

    >>> import torch
    >>> magnitude(torch.tensor([[-2.0, 1.0]]), p=2).tolist()
    [[4.0, 1.0]]

    Source: Han et al., Learning both weights and connections, arXiv 1506.02626, section 3.1.
    """
    return weight.abs() if p == 1 else weight.abs().pow(p)
