"""Where a model is to run, and which sparsity that hardware has arithmetic for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import RecipeError
from ..kernels import described

#: NVIDIA's generations, the oldest first. Sparse tensor cores come with Ampere.
GENERATIONS = ("pascal", "volta", "turing", "ampere", "ada", "hopper", "blackwell")
_CARDS = {
    "p100": "pascal", "1080": "pascal", "v100": "volta", "t4": "turing", "2080": "turing", "a100": "ampere",
    "a10": "ampere", "a30": "ampere", "a40": "ampere", "a6000": "ampere", "3090": "ampere", "3080": "ampere",
    "orin": "ampere", "l4": "ada", "l40": "ada", "l40s": "ada", "4090": "ada", "h100": "hopper", "h200": "hopper",
    "gh200": "hopper", "b100": "blackwell", "b200": "blackwell", "5090": "blackwell",
}  # fmt: skip
#: Instruction sets that the kernels of this package are written for, by what a user may write.
_INSTRUCTIONS = {
    "avx512": "AVX512", "avx512vnni": "AVX512", "avx2": "AVX2", "neon": "NEON", "arm": "NEON", "portable": "portable",
}  # fmt: skip
_OTHER = {"edge": "edge", "mobile": "edge", "phone": "edge", "microcontroller": "edge", "npu": "edge", "tpu": "other",
          "amd": "other", "rocm": "other", "apple": "other", "mps": "other", "fpga": "other", "any": "any"}  # fmt: skip


@dataclass(frozen=True)
class Hardware:
    """Where a model is to run.

    Attributes:
        family: ``cpu``, ``nvidia``, ``edge`` (phones, accelerators without sparse arithmetic), ``other`` or ``any``.
        generation: of an NVIDIA GPU; empty where nobody said.
        instructions: of a CPU, as torch names them; empty where nobody said and this machine's are not known.
        kernels: whether the sparse kernels of this package run there.
    """

    family: str = "any"
    generation: str = ""
    instructions: str = ""
    kernels: bool = False

    @staticmethod
    def parse(text: str) -> Hardware:
        """Read what a user writes: ``cpu`` (this machine's), ``cpu avx2``, ``nvidia ampere``, ``h100``, ``edge``.

        >>> Hardware.parse("nvidia ampere").two_in_four, Hardware.parse("nvidia turing").two_in_four
        (True, False)
        >>> Hardware.parse("cpu avx512").kernels, Hardware.parse("edge").kernels
        (True, False)

        Raises:
            RecipeError: it is not known.
        """
        words = re.findall(r"[a-z0-9]+", text.lower())
        known = [w for w in words if w in ("cpu", "x86", "nvidia", "cuda", "gpu", *GENERATIONS, *_CARDS, *_OTHER)]
        sets = [w for w in words if w in _INSTRUCTIONS]
        rest = [w for w in words if w not in (*known, *sets, "rtx", "gtx", "geforce", "tesla", "jetson")]
        if not words or rest or not (known or sets):
            raise RecipeError(
                f"the hardware '{text}' is not known: write cpu, 'cpu avx2', 'cpu avx512', 'cpu arm', 'nvidia ampere' "
                f"(or {', '.join(g for g in GENERATIONS if g != 'ampere')}), a card such as h100, edge, or any"
            )
        families = {_OTHER.get(w, "cpu" if w in ("cpu", "x86") else "nvidia") for w in known}
        families |= {"cpu"} if sets else set()
        if len(families) != 1:
            raise RecipeError(f"the hardware '{text}' names {' and '.join(sorted(families))}: name one")
        family = families.pop()
        if family == "nvidia":
            generations = {w if w in GENERATIONS else _CARDS[w] for w in known if w in GENERATIONS or w in _CARDS}
            if len(generations) > 1:
                raise RecipeError(f"the hardware '{text}' names {' and '.join(sorted(generations))}: name one")
            return Hardware("nvidia", generation=generations.pop() if generations else "")
        if family == "cpu":
            return Hardware("cpu", instructions=_INSTRUCTIONS[sets[0]], kernels=True) if sets else _here()
        return Hardware(family)

    @property
    def two_in_four(self) -> bool:
        """Whether there is arithmetic for two weights of every four (sparse tensor cores)."""
        return self.generation in GENERATIONS[GENERATIONS.index("ampere") :]

    def __str__(self) -> str:
        if self.family == "nvidia":
            return f"an NVIDIA GPU ({self.generation or 'of an unknown generation'})"
        if self.family == "cpu":
            with_kernels = "with" if self.kernels else "without"
            return f"a CPU ({self.instructions or 'unknown instructions'}, {with_kernels} sparse kernels)"
        return {"edge": "an edge device", "any": "any hardware"}.get(self.family, "other hardware")


def _here() -> Hardware:
    """The CPU of this machine, by the kernels that are active on it."""
    active = described()["active"]
    names = {"avx512vnni": "AVX512", "avx512": "AVX512", "avx2": "AVX2", "portable": "portable", "neon": "NEON"}
    if active is None:
        return Hardware("cpu")
    return Hardware("cpu", instructions=names.get(str(active), str(active)), kernels=True)
