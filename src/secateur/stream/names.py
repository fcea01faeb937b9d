"""Names and layouts of tensors in files against those of parameters in the model.

Most checkpoints use the model's own names. Some do not: a prefix is left out, a head is renamed, experts
are stored one by one and fused in the model. transformers knows these conversions; here they are applied
to a few tensors at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from ..errors import ModelError


class Names:
    """The conversion between files and model.

    Args:
        model: on ``meta``.
        stored: names of the tensors in the files.
    """

    def __init__(self, model: nn.Module, stored: Iterable[str]) -> None:
        self.model = model
        known = dict(model.state_dict())
        stored = list(stored)
        self.of: dict[str, str] = {n: n for n in stored}  # file name -> parameter name
        self._pattern: dict[str, str] = {}  # file name -> pattern of the converter that takes it
        self._converters: dict[str, Any] = {}
        self._targets: set[str] = set()
        if all(n in known for n in stored):
            return
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
        except ImportError:
            return
        mapping: Any = get_model_conversion_mapping(model)
        renamings = [m for m in mapping or [] if isinstance(m, WeightRenaming)]
        converters = [m for m in mapping or [] if isinstance(m, WeightConverter)]
        self._converters = {p: c for c in converters for p in c.source_patterns}
        prefix = getattr(model, "base_model_prefix", None)
        for name in stored:
            new, pattern = rename_source_key(name, renamings, converters, prefix, known)
            if new not in known and name in known:
                new, pattern = name, None
            self.of[name] = new
            if pattern is not None:
                self._pattern[name] = pattern
                self._targets.add(new)

    def converted(self, stored: str) -> bool:
        """Whether a tensor of the files goes through a converter, so that its shape is not the parameter's."""
        return stored in self._pattern

    def fused(self, parameter: str) -> bool:
        """Whether a parameter is put together from several tensors of the files."""
        return parameter in self._targets

    def to_model(self, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters from tensors as stored."""
        made: dict[str, Tensor] = {}
        waiting: dict[str, Any] = {}
        for name in sorted(raw, key=_natural):
            pattern = self._pattern.get(name)
            if pattern is None:
                made[self.of[name]] = raw[name]
            else:
                converter = waiting.setdefault(self.of[name], deepcopy(self._converters[pattern]))
                converter.add_tensor(self.of[name], name, pattern, raw[name])
        for first, converter in waiting.items():
            found = converter.convert(first, model=self.model, config=self.model.config)
            made.update({n: t[0] if isinstance(t, list) else t for n, t in found.items()})
        return made

    def to_files(self, made: Mapping[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
        """The inverse of `to_model`; ``expected`` are the names in the files."""
        expected = set(expected)
        plain = {self.of[n]: n for n in expected if n not in self._pattern}
        out = {plain[n]: t for n, t in made.items() if n in plain}
        fused = {n: t for n, t in made.items() if n not in plain}
        if fused:
            from transformers.core_model_loading import revert_weight_conversion

            found = revert_weight_conversion(self.model, fused)
            out.update({n: t.contiguous() for n, t in found.items()})
        if set(out) != expected:
            odd = sorted(set(out) ^ expected)[0]
            raise ModelError(f"{odd} cannot be written back under the name it has in the files: prune with --resident")
        return out


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key in which expert 10 follows expert 9."""
    return [(0, int(p)) if p.isdigit() else (1, p) for p in name.split(".")]
