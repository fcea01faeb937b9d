"""Linear layers that read, token by token, only those rows and columns of their weights that count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..errors import DataError
from ..registry import get
from ..stream import find_blocks
from .decoder import dense_cache, generation
from .structure import first_tensor

#: In so many pieces the sum for one token is made, where each has at least so many features.
_PIECES, _LEAST = 8, 16


@dataclass(frozen=True, eq=False)
class Kept:
    """What counts of some tokens' features.

    Attributes:
        at: the features, of all tokens one after the other.
        token: the token of each.
        start: where each token's begin.
    """

    at: Tensor
    token: Tensor
    start: Tensor

    @staticmethod
    def of(keep: Tensor) -> Kept:
        """Of a mask ``(tokens, features)``."""
        token, at = keep.nonzero().unbind(1)
        counts = keep.sum(1) if len(keep) > 1 else keep.new_zeros(1, dtype=torch.long)
        return Kept(at, token, counts.cumsum(0) - counts)

    def of_rows(self, x: Tensor) -> Tensor:
        """These features of ``x``, ``(tokens, features)``."""
        return x[0].index_select(0, self.at) if len(x) == 1 else x[self.token, self.at]


def columns_product(values: Tensor, kept: Kept, columns: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T`` of the features that are kept; columns of the weight for the others are not read.

    Args:
        values: the features that are kept, one after the other.
        columns: the weight transposed, ``(i, o)``, contiguous.

    >>> x, w = torch.tensor([[2.0, 0.1]]), torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    >>> kept = Kept.of(x > 1)
    >>> columns_product(kept.of_rows(x), kept, w.T.contiguous(), None).tolist()
    [[2.0, 10.0]]
    """
    start, count = kept.start, len(kept.at)
    if pieces := len(start) == 1 and count >= _PIECES * _LEAST:  # one bag is summed by one thread
        start = torch.arange(_PIECES, device=start.device) * count // _PIECES
    out: Tensor = torch.embedding_bag(columns, kept.at, start, False, 0, False, values)[0]
    if pieces:
        out = out.sum(0, keepdim=True)
    return out if bias is None else out + bias


def rows_product(x: Tensor, kept: Kept, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The outputs of ``x W^T`` that are kept, one after the other; rows of the weight for the others are not read.

    Args:
        x: ``(tokens, i)``.
        kept: of the outputs.
        weight: ``(o, i)``.

    >>> x, w = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    >>> rows_product(x, Kept.of(torch.tensor([[False, True]])), w, None).tolist()
    [17.0]
    """
    # A product of each pair of a row of x and one of the weight: what the weights of a bag get as their gradient.
    out: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x.contiguous(), weight, kept.at, kept.start, kept.token, 0
    )
    return out if bias is None else out + bias[kept.at]


class Site(Protocol):
    """A module that computes less, token by token.

    Attributes:
        path: of the module.
        threshold: features are left out whose score is at most this; None where something else decides.
        kept, seen: how many features were not left out, of how many, where tokens were decoded.
    """

    path: str
    threshold: Any
    kept: int
    seen: int

    def run(self, x: Tensor, sparse: bool) -> Tensor:
        """The module's output: without reading what does not count, or with zeros in place of it."""


class Scored(Site, Protocol):
    """One that compares scores with a threshold."""

    def score(self, x: Tensor) -> Tensor:
        """What the threshold is compared with, of the input of the module; ``(..., features)``."""

    def flops(self, fraction: float) -> int:
        """Operations of a token that are saved where this fraction of the features is left out."""


def scored(x: Tensor) -> Tensor:
    """The criterion of all that is decided here."""
    found: Tensor = get("criterion", "activation-size")({"activation": x})
    return found


class Columns:
    """A weight by columns, made when it is first read, and again after it has changed."""

    def __init__(self) -> None:
        self.made: Tensor | None = None
        self.known: tuple[int, int] | None = None

    def of(self, weight: Tensor) -> Tensor:
        """The weight transposed, contiguous."""
        now = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        if self.made is None or self.known != now:
            self.made, self.known = weight.detach().T.contiguous(), now
        return self.made


@dataclass(eq=False)
class Inputs:
    """A linear layer that leaves out small features of its input.

    Attributes:
        recent: shared by the layers of a model: what was last kept of which input, for those that read the same one.
    """

    path: str
    layer: nn.Linear
    recent: dict[str, Any] = field(default_factory=dict, repr=False)
    threshold: float = 0.0
    kept: int = 0
    seen: int = 0
    columns: Columns = field(default_factory=Columns, repr=False)

    def score(self, x: Tensor) -> Tensor:
        return scored(x)

    def run(self, x: Tensor, sparse: bool) -> Tensor:
        if not sparse:
            return linear(x * (self.score(x) > self.threshold), self.layer.weight, self.layer.bias)
        columns = self.columns.of(self.layer.weight)
        recent = self.recent
        if recent.get("x") is not x or recent["threshold"] != self.threshold:
            flat = x.flatten(0, -2)
            kept = Kept.of(self.score(flat) > self.threshold)
            recent.update(x=x, threshold=self.threshold, kept=kept, values=kept.of_rows(flat))
        kept = recent["kept"]
        self.kept, self.seen = self.kept + len(kept.at), self.seen + x.numel()
        out = columns_product(recent["values"], kept, columns, self.layer.bias)
        return out.view(*x.shape[:-1], -1)

    def flops(self, fraction: float) -> int:
        return round(2 * self.layer.weight.numel() * fraction)


@dataclass(eq=False)
class Gated:
    """A feed-forward part ``down(act(gate(x)) * up(x))`` that leaves out neurons whose gate is nearly shut."""

    path: str
    gate: nn.Linear
    act: nn.Module
    up: nn.Linear
    down: nn.Linear
    threshold: float = 0.0
    kept: int = 0
    seen: int = 0
    columns: Columns = field(default_factory=Columns, repr=False)

    def score(self, x: Tensor) -> Tensor:
        return scored(self.act(self.gate(x)))

    def run(self, x: Tensor, sparse: bool) -> Tensor:
        opened = self.act(self.gate(x))
        keep = scored(opened) > self.threshold
        if not sparse:
            found: Tensor = self.down(opened * keep * self.up(x))
            return found
        columns = self.columns.of(self.down.weight)
        kept = Kept.of(keep.flatten(0, -2))
        self.kept, self.seen = self.kept + len(kept.at), self.seen + keep.numel()
        up = rows_product(x.flatten(0, -2), kept, self.up.weight, self.up.bias)
        out = columns_product(kept.of_rows(opened.flatten(0, -2)) * up, kept, columns, self.down.bias)
        return out.view(*x.shape[:-1], -1)

    def flops(self, fraction: float) -> int:
        return round(2 * (self.up.weight.numel() + self.down.weight.numel()) * fraction)


class SparseDecoder(nn.Module):
    """A decoder some of whose layers read only what counts for the token that is decoded.

    Where one token of each text goes through, rows and columns of weights are really not read (with gradients, they are
    multiplied by zeros). A prompt, and any other input of more than one token, is computed in full; with ``prompt`` the
    same features are set to zero there, which takes as long as ever.

    Attributes:
        model: the dense model, with its own weights.
        sites: what leaves out.
        prompt: whether inputs of several tokens are masked.
        record: how it was made; plain data.
        predictors: what was learned, for methods that decide so.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Iterable[Site],
        prompt: bool,
        record: Mapping[str, Any],
        predictors: Iterable[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.model, self.sites, self.prompt, self.record = model, list(sites), prompt, dict(record)
        self.predictors = nn.ModuleList(predictors)
        self.tokens = 0
        blocks = find_blocks(model)
        assert blocks is not None
        self._places = [blocks.modules[0], *(model.get_submodule(site.path) for site in self.sites)]
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._sparse():
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own ``generate``."""
        with self._sparse():
            return generation(self.model)(*args, **kwargs)

    def cache(self) -> Any:
        """A fresh cache, for calls that go on where another one ended."""
        return dense_cache(self.model)

    @property
    def left_out(self) -> float:
        """The share of features that was left out where tokens were decoded, so far."""
        seen = sum(site.seen for site in self.sites)
        return 1 - sum(site.kept for site in self.sites) / seen if seen else 0.0

    @contextmanager
    def _sparse(self) -> Iterator[None]:
        handle = self._places[0].register_forward_pre_hook(self._look, with_kwargs=True)
        calls = zip(self._places[1:], self.sites, strict=True)
        try:
            with patched((module, self._call(module.forward, site)) for module, site in calls):
                yield
        finally:
            handle.remove()

    def _look(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        """How many tokens of each text go through the blocks, which layers that are given rows cannot tell."""
        x = first_tensor(args, kwargs)
        self.tokens = 0 if x is None or x.dim() != 3 else x.shape[1]

    def _call(self, dense: Callable[[Tensor], Tensor], site: Site) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            single = (x.shape[1] if x.dim() == 3 else self.tokens) == 1
            if not single and not self.prompt:
                found: Tensor = dense(x)
                return found
            return site.run(x, single and not torch.is_grad_enabled())

        return call

    def extra_repr(self) -> str:
        return str(self.record)

    def saved(self) -> dict[str, Any]:
        found = {site.path: site.threshold for site in self.sites if site.threshold is not None}
        return {"prompt": self.prompt, "thresholds": found}

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.predictors.state_dict())

    def told(self) -> str:
        """What was made, in one line."""
        record = self.record
        where = "zeros in prompts too" if self.prompt else "prompts in full"
        count = len(record.get("parts", self.sites))
        found = f"{record['method']}: {100 * record['fraction']:.0f} % of the features of {count} sites, {where}"
        if (recall := record.get("recall")) is None:
            return found
        one, same = (100 * sum(shares) / len(shares) for shares in recall.values())
        return (
            f"{found}; predictors of {record['predictors']['parameters']:,} parameters find {one:.1f} % of what counts "
            f"in held-out text, the same features for every token {same:.1f} %"
        )


@contextmanager
def patched(calls: Iterable[tuple[nn.Module, Callable[[Tensor], Tensor]]]) -> Iterator[None]:
    """Inside, these modules compute otherwise."""
    known = list(calls)
    try:
        for module, call in known:
            module.__dict__["forward"] = call
        yield
    finally:
        for module, _ in known:
            module.__dict__.pop("forward", None)


def thresholds(
    model: nn.Module, sites: list[Scored], batches: list[Any], fractions: Mapping[str, float], run: Callable[..., Any]
) -> None:
    """Set thresholds so that exactly ``round(fraction n)`` of the scores on the data are left out, ties aside.

    Two passes: the first counts scores by the upper half of their bits, which are in the order of the scores; the
    second looks at those alone that share the upper half with the one that is sought.
    """
    coarse = {site.path: torch.zeros(1 << 16, dtype=torch.long) for site in sites}

    def count(site: Scored, x: Tensor) -> None:
        coarse[site.path] += torch.bincount(_upper(site.score(x)).cpu(), minlength=1 << 16)

    _through(model, sites, batches, run, count)
    sought: dict[str, tuple[int, int]] = {}
    for path, found in coarse.items():
        total = int(found.sum())
        if total == 0:
            raise DataError(f"no token of the data went through {path}: its threshold is not known")
        rank = int(fractions[path] * total + 0.5)
        if rank:
            below = found.cumsum(0)
            bucket = int((below >= rank).nonzero()[0])
            sought[path] = (bucket, rank - int(below[bucket] - found[bucket]))
    fine: dict[str, list[Tensor]] = {path: [] for path in sought}

    def look(site: Scored, x: Tensor) -> None:
        if site.path in sought:
            score = site.score(x).flatten()
            fine[site.path].append(score[_upper(score) == sought[site.path][0]].cpu())

    _through(model, sites, batches, run, look)
    for site in sites:
        if site.path in sought:
            site.threshold = float(torch.cat(fine[site.path]).kthvalue(sought[site.path][1]).values)
        else:
            site.threshold = -1.0  # nothing


def _upper(score: Tensor) -> Tensor:
    """The upper half of the bits of floats that are not negative, in their order."""
    return score.float().flatten().view(torch.int32) >> 16


def _through(
    model: nn.Module,
    sites: list[Scored],
    batches: list[Any],
    run: Callable[..., Any],
    look: Callable[[Scored, Tensor], None],
) -> None:
    """Run the dense model on the data, and look at what the sites are given."""

    def hook(site: Scored, batch: Any, module: nn.Module, args: tuple[Any, ...]) -> None:
        look(site, tokens_of(batch, args[0]))

    for batch in batches:
        handles = [
            model.get_submodule(site.path).register_forward_pre_hook(partial(hook, site, batch)) for site in sites
        ]
        try:
            run(model, batch)
        finally:
            for handle in handles:
                handle.remove()


def tokens_of(batch: Any, x: Tensor) -> Tensor:
    """The features of the tokens of a batch that are no padding, ``(tokens, features)``, of those of all."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    flat = x.flatten(0, -2)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.numel() != len(flat):
        return flat
    return flat[mask.flatten().to(x.device) != 0]
