"""A key-value cache that entries leave; imported where transformers is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from .policy import Policy
from .rotary import Rotation

#: Entries by which a layer's memory grows.
_STEP = 16

#: The layer whose entries attention is given next.
updated: ContextVar[PrunedLayer | None] = ContextVar("updated", default=None)


class PrunedLayer(CacheLayerMixin):  # type: ignore[misc]
    """The cache of one layer, in which as many entries stay as its policy says, for each input and head its own.

    ``keys`` and ``values`` are what there is, ``(batch, heads, entries, width)``; entries are in no order, and
    ``position`` says where each stands in its text. `get_seq_length` counts all tokens seen, those that left as well.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False
    keys: Any
    values: Any

    def __init__(self, policy: Policy, rotation: Rotation | None) -> None:
        super().__init__()
        self.policy, self.rotation = policy, rotation
        self.reset()

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.seen = self.length = self.entered = self.settled = 0
        self.pruned = False
        self.held: dict[str, Tensor] = {}  # keys, values, position, score: with room for more entries
        self.first = self.gone = torch.zeros(0, dtype=torch.long)
        self.sink_keys: Tensor | None = None  # as they came, before they are turned
        self.sink_slots: Tensor | None = None
        self.oldest: int | None = None  # the slot that is next to leave, where it is the same one everywhere

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, width = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.held = {
            "keys": key_states.new_empty(batch, heads, 0, width),
            "values": value_states.new_empty(batch, heads, 0, value_states.shape[-1]),
            "position": torch.empty(batch, heads, 0, dtype=torch.int32, device=self.device),
        }
        if self.policy.attends:
            self.held["score"] = torch.empty(batch, heads, 0, dtype=torch.float32, device=self.device)
        self.first = self.gone = torch.zeros(batch, dtype=torch.long, device=self.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        end = self.length + new
        if end > self.held["keys"].shape[2]:
            self._grow(end)
        here = slice(self.length, end)
        self.held["keys"][:, :, here] = key_states
        self.held["values"][:, :, here] = value_states
        if new == 1:
            self.held["position"][:, :, here].fill_(self.seen)
        else:
            self.held["position"][:, :, here] = torch.arange(
                self.seen, self.seen + new, dtype=torch.int32, device=self.device
            )
            self.oldest = None
        if "score" in self.held:
            self.held["score"][:, :, here].zero_()
        self.length, self.seen, self.entered = end, self.seen + new, new
        shown = self._show()
        updated.set(self)
        return shown

    def _grow(self, needed: int) -> None:
        room = -(-needed // _STEP) * _STEP
        for name, old in self.held.items():
            more = old.new_empty(*old.shape[:2], room, *old.shape[3:])
            more[:, :, : self.length] = old[:, :, : self.length]
            self.held[name] = more

    def _show(self) -> tuple[Tensor, Tensor]:
        found = self.held["keys"][:, :, : self.length], self.held["values"][:, :, : self.length]
        shown: Any = self  # the class of transformers says None
        shown.keys, shown.values = found
        return found

    @property
    def position(self) -> Tensor:
        """Where each entry stands in its text, padding included, ``(batch, heads, entries)``."""
        return self.held["position"][:, :, : self.length]

    def columns(self, mask: Tensor | None) -> Tensor | None:
        """A mask over all tokens seen, ``(batch, 1, queries, tokens)``, as one over the entries that there are."""
        if mask is None and (self.entered == 1 or not self.pruned):
            return None
        if mask is None:
            query = torch.arange(self.seen - self.entered, self.seen, device=self.device)
            return self.position[:, :, None] <= query[:, None]
        if not self.pruned:
            return mask
        at = self.position[:, :, None].long()
        heads = at.shape[1]
        return mask.expand(-1, heads, -1, -1).gather(3, at.expand(-1, -1, mask.shape[2], -1))

    def settle(self, received: Tensor | None, mask: Tensor | None) -> None:
        """After the attention: count what entries received, and let those leave that are too many."""
        self.settled = self.seen
        if received is not None:
            self.held["score"][:, :, : self.length] += received
        count = self.policy.count(self.seen)
        if self.length <= count or (self.policy.once and self.seen > self.entered):
            self.oldest = None  # what is added stands behind those that came later
            return
        dead = None
        if mask is not None:  # padding is what the last query does not see
            last = mask[:, :, -1]
            seen = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
            dead = None if bool(seen.all()) else ~seen.expand_as(self.position)
            # Padding leaves first, so that the first token of each text is there whenever any is.
            at = self.position[:, 0].masked_fill(~seen[:, 0].expand_as(self.position[:, 0]), self.seen)
            self.first = at.amin(1).long()
        if dead is None and self.length - count == 1 and self._one_leaves(count):
            return
        score = self.held["score"][:, :, : self.length] if "score" in self.held else None
        stays = self.policy.chosen(self.position, self.first, self.seen, score, dead)
        left = self.gone
        if self.policy.shift:
            lost = ~stays if dead is None else ~(stays | dead)
            left = self.gone + lost[:, 0].sum(1)
        self._leave(stays, count)
        self.pruned = True
        if self.policy.shift and self.policy.sinks and self.rotation is not None:
            self._turn(left)
        self.gone = left
        self.oldest = self._ring() if dead is None and not self.policy.attends else None

    def _one_leaves(self, count: int) -> bool:
        """Let one entry of each head leave where that can be told without a look at all of them; whether it could."""
        policy = self.policy
        if self.oldest is not None:  # by age alone: entries stand in a ring, behind the sinks
            slot = self.oldest
            for held in self.held.values():
                held[:, :, slot] = held[:, :, count]
            self.oldest = policy.sinks if slot + 1 == count else slot + 1
            self._shorten(count)
            if policy.shift:
                self.gone = self.gone + 1
                if policy.sinks and self.rotation is not None:
                    assert self.sink_keys is not None
                    self.held["keys"][:, :, : policy.sinks] = self.rotation(self.sink_keys, self.gone)
            return True
        if not policy.attends or policy.shift or policy.smooth > 1:
            return False
        score = self.held["score"][:, :, : self.length]
        self._move(policy.least_of(self.position, self.first, self.seen, score), count)
        self.pruned = True
        return True

    def _ring(self) -> int | None:
        """Where the oldest entry but the sinks stands, if all stand in the order of their text in all heads."""
        sinks = self.policy.sinks
        front, behind = self.position[:, :, :sinks], self.position[:, :, sinks:]
        there = front - self.first[:, None, None] == torch.arange(sinks, device=self.device)
        ordered = (behind == behind[:1, :1]).all() & (behind[0, 0].diff() > 0).all()
        turned = (self.gone > 0).all() if self.policy.shift else torch.ones((), dtype=torch.bool, device=self.device)
        return sinks if bool(there.all() & ordered & turned) and behind.shape[2] else None

    def _leave(self, stays: Tensor, count: int) -> None:
        if self.policy.attends and self.length - count == 1:
            self._move((~stays).to(torch.int8).argmax(2, keepdim=True), count)
            return
        if self.policy.attends:
            at = stays.nonzero()[:, 2].view(*stays.shape[:2], count)
        else:  # in the order of the text
            at = self.position.masked_fill(~stays, self.seen).argsort(2)[:, :, :count]
        room = -(-(count + 1) // _STEP) * _STEP
        for name, held in self.held.items():
            kept = held.new_empty(*held.shape[:2], room, *held.shape[3:])
            kept[:, :, :count] = held.gather(2, _wide(at, held))
            self.held[name] = kept
        self.sink_slots = None
        self._shorten(count)

    def _move(self, slot: Tensor, count: int) -> None:
        """The last entry takes the place of the one that leaves, ``(batch, heads, 1)``."""
        for held in self.held.values():
            held.scatter_(2, _wide(slot, held), held[:, :, count : count + 1].clone())
        self._shorten(count)

    def _shorten(self, count: int) -> None:
        self.length = count
        self._show()

    def _turn(self, left: Tensor) -> None:
        """Turn the keys of the sinks to where they stand in the cache, right in front of what is left of the text."""
        keys, fresh = self.held["keys"], self.gone == 0
        if self.sink_slots is None or bool(fresh.any()):
            offset = self.position - self.first[:, None, None]
            order = torch.where((offset >= 0) & (offset < self.policy.sinks), -offset, -(2**30))
            self.sink_slots = order.topk(min(self.policy.sinks, self.length), 2).indices
            found = keys.gather(2, _wide(self.sink_slots, keys))
            old = found if self.sink_keys is None else self.sink_keys
            self.sink_keys = torch.where(fresh[:, None, None, None], found, old)
        assert self.sink_keys is not None and self.rotation is not None
        keys.scatter_(2, _wide(self.sink_slots, keys), self.rotation(self.sink_keys, left))

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held."""
        held = [*self.held.values(), *(t for t in (self.sink_keys, self.sink_slots) if t is not None)]
        return sum(t.untyped_storage().nbytes() for t in held)

    # -- what transformers asks ------------------------------------------------------------------------

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._batched(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._batched(lambda t: t.repeat_interleave(repeats, 0))

    def _batched(self, change: Callable[[Tensor], Tensor]) -> None:
        if not self.is_initialized:
            return
        self.held = {name: change(t) for name, t in self.held.items()}
        self.first, self.gone = change(self.first), change(self.gone)
        self.sink_keys = None if self.sink_keys is None else change(self.sink_keys)
        self.sink_slots = None if self.sink_slots is None else change(self.sink_slots)
        self._show()


def _wide(at: Tensor, held: Tensor) -> Tensor:
    """Slots ``(batch, heads, some)`` as indices of what is held there."""
    return at if held.dim() == 3 else at[..., None].expand(-1, -1, -1, held.shape[3])


class PrunedCache(Cache):  # type: ignore[misc]
    """A cache for `generate` and forward passes, whose layers with full attention entries leave."""

    def __init__(self, config: Any, policy: Policy, rotations: Mapping[int, Rotation]) -> None:
        layers = DynamicCache(config=config).layers
        for number, layer in enumerate(layers):
            if type(layer) is DynamicLayer:  # what has a window or a state of its own stays as it is
                layers[number] = PrunedLayer(policy, rotations.get(number))
        super().__init__(layers=layers)

    @property
    def pruned(self) -> list[PrunedLayer]:
        """The layers that entries leave."""
        return [layer for layer in self.layers if isinstance(layer, PrunedLayer)]

    @property
    def entries(self) -> list[int]:
        """How many entries each of those layers has, for each input and head."""
        return [layer.length for layer in self.pruned]


def nbytes(cache: Any) -> int:
    """Bytes that a cache of transformers holds."""
    own = sum(layer.nbytes for layer in cache.layers if isinstance(layer, PrunedLayer))
    return own + sum(t.untyped_storage().nbytes() for t in others(cache))


def others(cache: Any) -> list[Tensor]:
    """What layers hold that entries do not leave: windows, and states of their own."""
    held = [vars(layer) for layer in cache.layers if not isinstance(layer, PrunedLayer)]
    return [t for t in tree_leaves(held) if isinstance(t, Tensor)]
