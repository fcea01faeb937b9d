"""The survey's taxonomy of pruning as data, and where each registered part belongs in it.

A part may say where it belongs with the fact ``survey`` (a node id or several); otherwise its place
follows from what it is: its family, its granularity, when it acts, the axes of its recipe.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import RecipeError
from ..registry import Part, get

#: Whose axes the tree has.
SOURCE = (
    "Cheng, Zhang and Shi, A Survey on Deep Neural Network Pruning: Taxonomy, Comparison, Analysis, and "
    "Recommendations, arXiv 2308.06767"
)


@dataclass(frozen=True)
class Node:
    """A node of the taxonomy.

    Attributes:
        id: short name, stable; parts refer to it.
        title: what it holds, in few words; ours, not a quotation.
        parent: id of the node above, or "" for an axis.
        beyond: not a node of the survey; added because readers look for it.
    """

    id: str
    title: str
    parent: str
    beyond: bool = False


_TREE = """
A     Universal or specific speedup
A1    Unstructured
A2    Semi-structured
A2.1  N:M
A2.2  Pattern
A2.3  Block
A3    Structured
A3.1  Filter, channel, neuron
A3.2  Layer, block (depth)
A3.3  Attention head
A3.4  Width, depth and heads jointly
A3.5  Embedding, hidden dimension
A3.6  Token, input data
A3.7  Coupled, dependency-aware
A3.8  Early exit, conditional depth *
A3.9  Expert of a mixture *
B     When to prune
B1    Before training
B2    During training
B2.1  Sparsity regularization
B2.2  Dynamic sparse training
B2.3  Score-based
B2.4  Learnable thresholds, differentiable
B3    After training
B3.1  Lottery tickets and their variants
B3.2  Other score-based
B3.3  Sparsity regularization
B3.4  In early training
B3.5  Post-training, without retraining
B3.6  Large language models
B4    Run time (dynamic)
C1    Pruning criteria
C1.1  Magnitude
C1.2  l_p norm of a structure
C1.3  Sensitivity, saliency
C1.4  Loss change
C2    Learn to prune
C2.1  Sparsity regularization
C2.2  Meta-learning
C2.3  Graph neural network
C2.4  Reinforcement learning
D     Fusion with other compression
D1    Quantization
D2    Tensor decomposition
D3    Neural architecture search
D4    Knowledge distillation
D5    Several at once
E     Domains
E1    Convolutional networks
E2    Vision transformers
E3    Language models of BERT's size
E4    Large language models
E5    Diffusion models
E6    Vision-language models
E7    Speech, graphs, spiking networks, agents
F     Learning settings
F1    Continual
F2    Contrastive, self-supervised
F3    Federated
F4    Adversarial robustness
F5    Energy- and hardware-aware
"""


def _read(tree: str) -> dict[str, Node]:
    nodes: dict[str, Node] = {}
    for line in tree.split("\n"):
        if line.strip():
            id, title = line.split(None, 1)
            above = id.rpartition(".")[0] or id[0]
            parent = above if above in nodes else ""
            nodes[id] = Node(id, title.removesuffix(" *"), parent, title.endswith(" *"))
    return nodes


#: Every node by id, in the survey's order; ``C1`` and ``C2`` are axes of their own there, as here.
NODES: dict[str, Node] = _read(_TREE)

#: Families of criteria.
_FAMILIES = {
    "magnitude": ("C1.1",),
    "norm": ("C1.2",),
    "redundancy": ("C1.2",),
    "saliency": ("C1.3",),
    "sensitivity": ("C1.3",),
    "gradient": ("C1.3",),
    "activation": ("C1.3",),
    "movement": ("C1.3",),
    "curvature": ("C1.4",),
    "loss": ("C1.4",),
}

_GRANULARITIES = {
    "element": ("A1",),
    "row": ("A1",),
    "nm": ("A2.1",),
    "pattern": ("A2.2",),
    "block": ("A2.3",),
    "neuron": ("A3.1",),
    "filter": ("A3.1",),
    "channel": ("A3.1",),
    "depth": ("A3.2",),
    "experts": ("A3.9",),
    "head": ("A3.3",),
    "heads": ("A3.3",),
    "embedding": ("A3.5",),
    "tokens": ("A3.6",),
    "coupled": ("A3.7",),
}

#: Single parts whose place their kind and family do not tell.
_PARTS = {
    ("allocation", "owl"): ("E4",),
    ("driver", "gradual"): ("B2.3",),
    ("driver", "regrow"): ("B2.2",),
    ("driver", "gradual-regrow"): ("B2.2", "B2.3"),
    ("driver", "early-bird"): ("B3.4",),
    ("solver", "sparsegpt"): ("B3.5", "C1.4"),
    ("solver", "obc"): ("B3.5", "C1.4"),
    ("solver", "dsnot"): ("B3.5",),
    ("solver", "least-squares"): ("B3.5",),
    ("solver", "admm"): ("B3.5",),
    ("gate", "edge-popup"): ("B1", "B3.1"),
    ("gate", "gumbel-nm"): ("A2.1", "B2.4"),
    ("gate", "l0"): ("B2.1", "C2.1"),
    ("gate", "variational-dropout"): ("B2.1", "C2.1"),
    ("gate", "continuous-sparsification"): ("B2.4", "B3.1", "C2.1"),
    ("penalty", "greg"): ("B3.3", "C2.1"),
    ("penalty", "admm-training"): ("B3.3", "C2.1"),
    ("penalty", "hesso"): ("B2.3",),
    ("recovery", "rewind"): ("B3.1",),
    ("recovery", "project"): ("A3.5", "B3.5"),
    ("recovery", "distill"): ("D4",),
}

#: Where parts of a kind belong that no entry above places.
_KINDS = {"gate": ("B2.4",), "penalty": ("B2.1", "C2.1")}

#: What a method's facts ``when`` and ``family`` (the kind of model) say.
_WHEN = {"before": ("B1",), "during": ("B2",), "runtime": ("B4",)}
_MODELS = {"cnn": ("E1",), "vit": ("E2",), "bert": ("E3",), "llm": ("E4",), "diffusion": ("E5",)}


#: Examples of whole models, by node: what no single part shows.
EXAMPLES = {
    "A3.4": ("vision_transformer", "language_model"),
    "E1": ("classifier", "detector"),
    "E2": ("vision_transformer",),
    "E3": ("bert",),
    "E4": ("language_model", "experts"),
    "E5": ("diffusion",),
    "E6": ("vision_language",),
    "E7": ("speech",),
}


def nodes_of(part: Part) -> tuple[str, ...]:
    """The ids of the nodes where a part belongs, in the tree's order; none when it is in no node.

    The fact ``survey`` decides alone where it is given. A method belongs where the criterion, the
    granularity and the solver of its recipe belong, and where its facts ``when`` and ``family`` say.

    Raises:
        RecipeError: the fact ``survey`` names a node that does not exist.

    >>> from secateur.registry import Card
    >>> part = Part("criterion", "wanda", max, (), {}, Card(""), {"family": "activation"})
    >>> nodes_of(part)
    ('C1.3',)
    """
    what = f"{part.kind} '{part.name}'"
    if "survey" in part.facts:
        return _ordered(_many(part.facts["survey"]), what)
    found = [*_PARTS.get((part.kind, part.name), _KINDS.get(part.kind, ()))]
    if part.kind == "criterion":
        found += _FAMILIES.get(part.facts.get("family", ""), ())
    elif part.kind == "granularity":
        found += _GRANULARITIES.get(part.name, ())
    elif part.kind == "method":
        found += _MODELS.get(part.facts.get("family", ""), ())
        for used in parts_of(part).values():
            rewinds = (used.kind, used.name) == ("recovery", "rewind")
            if rewinds or used.kind in ("criterion", "granularity", "solver", "driver", "gate", "penalty"):
                found += nodes_of(used)
        found += _moment(part.facts.get("when", ""), part.facts.get("family", ""), found)
    return _ordered(found, what)


def _moment(when: str, family: str, found: Iterable[str]) -> tuple[str, ...]:
    """Where a method that acts at ``when`` belongs, given where its parts do."""
    if when != "after":
        return _WHEN.get(when, ())
    if family == "llm":
        return ("B3.6",)
    return () if any(id.startswith("B3.") for id in found) else ("B3.2",)


def parts_of(method: Part) -> dict[str, Part]:
    """The registered part on each axis of a method's recipe; empty when it has no recipe."""
    recipe = method.facts.get("recipe")
    if recipe is None:
        return {}
    return {**recipe.parts(), "granularity": get("granularity", granularity_name(recipe.granularity))}


def granularity_name(text: str) -> str:
    """The registered name of a granularity as recipes write it.

    >>> granularity_name("2:4"), granularity_name("block(4,4)"), granularity_name("row")
    ('nm', 'block', 'row')
    """
    return "nm" if re.fullmatch(r"\s*\d+\s*:\s*\d+\s*", text) else text.partition("(")[0].strip()


def _many(ids: Any) -> tuple[str, ...]:
    return (ids,) if isinstance(ids, str) else tuple(ids)


def _ordered(ids: Iterable[str], what: str) -> tuple[str, ...]:
    wanted = set(ids)
    if unknown := sorted(wanted - set(NODES)):
        raise RecipeError(f"{what} names survey node '{unknown[0]}', which does not exist; nodes: {', '.join(NODES)}")
    return tuple(id for id in NODES if id in wanted)
