"""A mixture of experts: whole experts, or neurons and heads (Qwen3-MoE from its config, fused weights).

python examples/experts.py
"""

from __future__ import annotations

import torch
import transformers
from common import options, smaller

import secateur


def mixture(small: bool, experts: int = 8) -> transformers.Qwen3MoeForCausalLM:
    """Fresh weights, real architecture: experts and router are single tensors of three dimensions."""
    width = 32 if small else 128
    config = transformers.Qwen3MoeConfig(
        hidden_size=width, moe_intermediate_size=2 * width, num_hidden_layers=2 if small else 4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=experts, num_experts_per_tok=2,
        vocab_size=200, max_position_embeddings=128,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config).eval()


def main() -> None:
    """Experts leave every layer by what they add for the tokens that reach them; of another copy, neurons and heads."""
    given = options(__doc__)
    torch.manual_seed(0)
    model = mixture(given.small)
    tokens = torch.randint(0, 200, (8, 32))
    plan = secateur.plan(model, "reap", sparsity=0.25, data=[tokens], example=tokens[:1])
    fewer = plan.shrink().eval()
    assert fewer.config.num_experts < 8
    print(f"experts of a layer: 8 to {fewer.config.num_experts}\n{plan}")
    with torch.inference_mode():
        assert fewer(tokens[:1]).logits.isfinite().all()
    smaller(mixture(given.small), "group-norm", "params 20%", {"input_ids": tokens[:1]}, lambda: mixture(given.small))


if __name__ == "__main__":
    main()
