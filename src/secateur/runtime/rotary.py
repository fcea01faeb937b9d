"""How a model turns its keys by their positions: found by running it, and proven on its own keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..layers import evaluating

#: Relative error that a rotation may have, of keys in float32 and in shorter floats.
_CLOSE, _SHORT = 2e-3, 5e-2

#: Where a table of cosines has one for each pair of features.
_HALVES: dict[str, Callable[[Tensor], Tensor]] = {
    "first": lambda x: x[..., : x.shape[-1] // 2],
    "even": lambda x: x[..., ::2],
    "all": lambda x: x,
}


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a module that makes cosines and sines of positions."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def at(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines at other positions, ``(batch, 1)``."""

        def other(x: Any) -> Any:
            return position if isinstance(x, Tensor) and not x.is_floating_point() else x

        cos, sin = self.module(*map(other, self.args), **{k: other(v) for k, v in self.kwargs.items()})
        return cos.float(), sin.float()


@dataclass(eq=False)
class Rotation:
    """Keys at a position, from those at another one.

    Attributes:
        call: what makes cosines and sines; None where keys do not depend on positions.
        half: where the table has those of each pair.
        pairs: features 0 and 1 are a pair, 2 and 3, and so on; else 0 and n/2, 1 and n/2 + 1.
    """

    call: _Call | None = None
    half: str = "first"
    pairs: bool = False
    recent: tuple[Tensor, Tensor, Tensor] | None = field(default=None, repr=False)

    def _angles(self, by: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines; found once for all layers that turn by as much."""
        assert self.call is not None
        if self.recent is None or self.recent[0].device != by.device or not torch.equal(self.recent[0], by):
            cos, sin = (_HALVES[self.half](x)[:, None] for x in self.call.at(by[:, None]))
            length = (cos.square() + sin.square()).sqrt()  # some models stretch what they turn
            self.recent = by.clone(), cos / length, sin / length
        return self.recent[1:]

    def __call__(self, key: Tensor, by: Tensor) -> Tensor:
        """Keys ``(batch, heads, tokens, width)``, so many positions later, ``(batch,)``."""
        if self.call is None:
            return key
        cos, sin = self._angles(by)
        n = 2 * cos.shape[-1]
        turned, rest = key[..., :n].float(), key[..., n:]
        a, b = (turned[..., ::2], turned[..., 1::2]) if self.pairs else turned.chunk(2, -1)
        x, y = a * cos - b * sin, b * cos + a * sin
        found = torch.stack((x, y), -1).flatten(-2) if self.pairs else torch.cat((x, y), -1)
        found = found.to(key.dtype)
        return torch.cat((found, rest), -1) if rest.shape[-1] else found


@contextmanager
def _calls(model: nn.Module, found: list[_Call]) -> Iterator[None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        pair = isinstance(out, (tuple, list)) and len(out) == 2 and all(isinstance(x, Tensor) for x in out)
        if pair and out[0].shape == out[1].shape and out[0].dim() == 3 and out[0].is_floating_point():
            length = (out[0].float().square() + out[1].float().square()).flatten()
            if torch.allclose(length, length[:1].expand_as(length), rtol=1e-2):
                found.append(_Call(module, args, kwargs))

    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rotations(
    model: nn.Module, keys: Callable[[Tensor], dict[int, Tensor]], tokens: int, far: int
) -> dict[int, Rotation]:
    """How keys of each layer turn with positions.

    Args:
        keys: of each layer, when the model runs on the example at these positions, ``(1, tokens)``.
        far: a position beyond all that the model knows, where keys still have to turn alike.

    Raises:
        ModelError: keys of a layer depend on positions in another way.
    """
    found: list[_Call] = []
    here = torch.arange(tokens)[None]
    with evaluating(model), torch.no_grad():
        with _calls(model, found):
            start = keys(here)
        try:
            near, beyond = keys(here + 7), keys(here + far)
        except (IndexError, RuntimeError):  # a table of positions that ends
            raise _refused(model) from None
        by = {int(k): torch.full((len(next(iter(start.values()))),), k) for k in (7, far)}
        seen: dict[int, _Call] = {id(c.module): c for c in found}
        known = [Rotation()] + [Rotation(*c) for c in product(seen.values(), _HALVES, (False, True))]
        made: dict[int, Rotation] = {}
        for layer, key in start.items():
            for turn in known:
                if _fits(partial(turn, key), by[7], near[layer]) and _fits(
                    partial(turn, key), by[far], beyond[layer], 10
                ):
                    made[layer] = turn
                    break
            else:
                raise _refused(model)
    return made


def _refused(model: nn.Module) -> ModelError:
    return ModelError(
        f"keys of {type(model).__name__} do not turn with positions as rotary embeddings of a fixed base do, so that "
        "they cannot be moved: give sinks=0, or take h2o"
    )


def _fits(turn: Callable[[Tensor], Tensor], by: Tensor, wanted: Tensor, slack: float = 1.0) -> bool:
    try:
        found = turn(by.to(wanted.device))
    except RuntimeError:  # another width
        return False
    close = slack * (_CLOSE if wanted.dtype == torch.float32 else _SHORT)
    return bool((found - wanted).float().norm() <= close * wanted.float().norm())
