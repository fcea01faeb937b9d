"""Prune with llm-compressor. Runs in the peer's own environment and imports nothing of secateur.

Prints one line of JSON: seconds of the ``oneshot`` call alone (the model is loaded, the windows are read and
nothing is saved), memory, and what was really pruned.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from importlib import metadata
from pathlib import Path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="directory in the transformers format")
    parser.add_argument("--windows", required=True, help="safetensors file with int64 token windows under the key ids")
    parser.add_argument("--method", choices=["wanda", "sparsegpt"], default="sparsegpt")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--pattern", default="0:0", help="0:0, or N:M: N of every M weights go")
    parser.add_argument("--out", help="save the pruned model there (outside the time)")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--batch", type=int, default=1, help="windows in a batch (its batch_size)")
    parser.add_argument("--prefetch", action="store_true", help="its sequential_prefetch")
    parser.add_argument("--no-propagate", action="store_true", help="its propagate_error=False: one pass, not two")
    return parser.parse_args()


def resident() -> int:
    """Resident memory now, in bytes (0 where the system does not tell)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def main() -> None:
    args = arguments()
    # Logging and progress bars cost time and are of no use here. (LLM_COMPRESSOR_LOG_DISABLED breaks 0.14: its
    # level METRIC is then unknown.)
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from llmcompressor.pipelines.sequential import SequentialPipeline
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if args.threads:
        torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = load_file(args.windows)["ids"]
    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    dataset = Dataset.from_dict(rows).with_format("torch")
    # The head is tied to the embedding here: its name must be matched by pattern, or it is pruned too.
    kind = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[args.method]
    recipe = kind(sparsity=args.sparsity, mask_structure=args.pattern, targets=["Linear"], ignore=["re:.*lm_head.*"])
    untouched = {n: p.detach().clone() for n, p in model.named_parameters() if _left_alone(model, n)}

    ran: list[int] = []  # how many batches each sequential pipeline was given
    original = SequentialPipeline.__call__

    def counted(model, dataloader, dataset_args):  # type: ignore[no-untyped-def]
        ran.append(len(dataloader))
        return original(model, dataloader, dataset_args)

    SequentialPipeline.__call__ = staticmethod(counted)
    loaded = resident()
    begun = time.perf_counter()
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=dataset,
        recipe=recipe,
        batch_size=args.batch,
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        shuffle_calibration_samples=False,
        sequential_prefetch=args.prefetch,
        propagate_error=not args.no_propagate,
    )
    seconds = time.perf_counter() - begun
    scale = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale

    after = dict(model.named_parameters())
    changed = [n for n, p in untouched.items() if not torch.equal(p, after[n])]
    pruned = [m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
    zeros = [int((w == 0).sum()) for w in pruned]
    total = sum(w.numel() for w in pruned)
    answer = {
        "seconds": seconds,
        "peak_memory": peak,
        "loaded_memory": loaded,
        "sparsity": sum(zeros) / total,
        "sparsity_min": min(z / w.numel() for z, w in zip(zeros, pruned, strict=True)),
        "sparsity_max": max(z / w.numel() for z, w in zip(zeros, pruned, strict=True)),
        "layers": len(pruned),
        "changed_outside": changed,
        "batches": ran,
        "threads": torch.get_num_threads(),
        "version": metadata.version("llmcompressor"),
        "versions": {n: metadata.version(n) for n in ("llmcompressor", "compressed-tensors", "torch", "transformers")},
    }
    if not ran:
        raise SystemExit("llm-compressor did not use its sequential pipeline: the comparison would not be fair")
    if args.out:
        model.save_pretrained(args.out, save_compressed=False)
        tokenizer.save_pretrained(args.out)
    print("\n" + json.dumps(answer), flush=True)


def _left_alone(model, name: str) -> bool:  # type: ignore[no-untyped-def]
    """Parameters that must come out as they went in: all but the weights of the linear layers in the blocks."""
    import torch

    owner = model.get_submodule(name.rpartition(".")[0])
    return not isinstance(owner, torch.nn.Linear) or "lm_head" in name


if __name__ == "__main__":
    main()
