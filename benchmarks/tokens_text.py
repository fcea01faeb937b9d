"""Sentence embeddings on fewer tokens, without training: Spearman's correlation with what people say, and CPU seconds.

Documents are those of Lee (50 short news texts and what people think of their likeness, in the wheel of gensim), word
pairs those of WordSim-353. Both are embedded in batches with padding, as they are in use. FLOPs are those executed.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from common import RESULTS, environment, table, write_json

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "power-bert, every block, 30%": ("power-bert", {"target": "flops 30%"}),
    "power-bert, every block, 40%": ("power-bert", {"target": "flops 40%"}),
    "power-bert, second to fifth, 30%": ("power-bert", {"target": "flops 30%", "at": (1, 2, 3, 4)}),
    "tome, every block, 30%": ("tome", {"target": "flops 30%"}),
    "tome, second and third, 30%": ("tome", {"target": "flops 30%", "at": (1, 2)}),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a directory with a BERT encoder and tokenizer.json")
    parser.add_argument(
        "--data", type=Path, required=True, help="lee.cor, similarities0-1.txt, wordsim353.tsv of gensim"
    )
    parser.add_argument("--batch", type=int, default=10, help="documents; words come in batches ten times as large")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS / "tokens_text.json")
    return parser.parse_args()


def batches(texts: list[str], tokenizer: Any, size: int) -> list[tuple[list[int], dict[str, Any]]]:
    """Texts of like length together: their numbers, and what the model is called with."""
    import torch

    ids = [tokenizer(text)["input_ids"] for text in texts]
    order = sorted(range(len(ids)), key=lambda k: len(ids[k]))
    found = []
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        longest = max(len(ids[k]) for k in rows)
        x = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(x)
        for row, k in enumerate(rows):
            x[row, : len(ids[k])], mask[row, : len(ids[k])] = torch.tensor(ids[k]), 1
        found.append((rows, {"input_ids": x, "attention_mask": mask}))
    return found


def embedder(folder: Path) -> Any:
    """The encoder, and the mean of its tokens behind it."""
    import transformers
    from torch import nn

    class Embedder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False)

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            x = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            mask = attention_mask.unsqueeze(-1).to(x.dtype)
            return nn.functional.normalize((x * mask).sum(1) / mask.sum(1), dim=-1)

    return Embedder().eval()


def embed(net: Any, given: list[Any]) -> Any:
    import torch

    out = torch.zeros(sum(len(rows) for rows, _ in given), 384)
    for rows, batch in given:
        out[rows] = net(**batch)
    return out


def spearman(a: Any, b: Any) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(a.numpy(), b.numpy()).statistic)


def main() -> None:
    args = arguments()
    import torch
    from transformers import PreTrainedTokenizerFast

    import secateur
    from secateur.measure.flops import flops

    torch.set_num_threads(args.threads)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(args.model / "tokenizer.json"))
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    texts = [x.strip() for x in (args.data / "lee.cor").read_text(encoding="latin-1").splitlines() if x.strip()]
    likeness = torch.tensor(
        [[float(x) for x in row.split()] for row in (args.data / "similarities0-1.txt").read_text().splitlines()]
    )
    above = torch.triu_indices(len(texts), len(texts), 1).unbind()
    pairs = [x.split("\t") for x in (args.data / "wordsim353.tsv").read_text().splitlines() if x and x[0] != "#"]
    words = sorted({w for pair in pairs for w in pair[:2]})
    left, right = (torch.tensor([words.index(pair[k]) for pair in pairs]) for k in (0, 1))
    said = torch.tensor([float(pair[2]) for pair in pairs])
    given = {"documents": batches(texts, tokenizer, args.batch), "words": batches(words, tokenizer, 10 * args.batch)}
    net = embedder(args.model)
    models: dict[str, Any] = {"dense": net}
    example = given["documents"][len(given["documents"]) // 2][1]
    for name, (method, options) in SETTINGS.items():
        models[name] = secateur.prune(net, method, example=example, **options)
    results: dict[str, Any] = {}
    with torch.inference_mode():
        whole = {kind: sum(flops(net, **b).total for _, b in x) for kind, x in given.items()}
        for name, model in models.items():
            found: dict[str, Any] = {}
            vectors = {kind: embed(model, x) for kind, x in given.items()}
            found["documents"] = spearman((vectors["documents"] @ vectors["documents"].T)[above], likeness[above])
            found["words"] = spearman((vectors["words"][left] * vectors["words"][right]).sum(1), said)
            for kind, x in given.items():
                found[f"flops, {kind}"] = sum(flops(model, **b).total for _, b in x) / whole[kind]
            took: dict[str, list[float]] = {"dense": [], "other": []}
            for turn in range(args.repeats):
                for which, m in [("dense", net), ("other", model)][:: 1 if turn % 2 else -1]:
                    begun = time.process_time()
                    embed(m, given["documents"])
                    took[which].append(time.process_time() - begun)
            found["ratio"] = min(took["dense"]) / min(took["other"])
            found["documents a CPU second"] = len(texts) / min(took["other"])
            if name != "dense":
                found["record"] = {k: model.record[k] for k in ("r", "keep", "at", "tokens")}
            results[name] = found
            settings = {"batch": args.batch, "repeats": args.repeats, "model": args.model.parent.name}
            write_json(args.out, {"environment": environment(args.threads), "settings": settings, "results": results})
            print(f"{name}: {found['documents']:.4f} documents, {found['words']:.4f} words", flush=True)
    rows = [
        [
            name, f"{100 * r['flops, documents']:.0f}", f"{r['documents']:.4f}", f"{r['ratio']:.2f}",
            f"{100 * r['flops, words']:.0f}", f"{r['words']:.4f}",
        ]
        for name, r in results.items()
    ]  # fmt: skip
    print(table(["setting", "FLOPs %", "documents", "CPU seconds, dense / this", "FLOPs %, words", "words"], rows))


if __name__ == "__main__":
    main()
