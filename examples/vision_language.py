"""A vision-language model: CLIP's two towers, layers' shares as in ECoFLaP, and a smaller CLIP.

python examples/vision_language.py
"""

from __future__ import annotations

import copy

import torch
import transformers
from common import options, smaller
from torch import Tensor, nn

import secateur
from secateur.families import ecoflap


def clip(small: bool) -> transformers.CLIPModel:
    """Both towers, from the config; fresh weights."""
    width, depth = (32, 2) if small else (128, 4)
    tower = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": depth, "num_attention_heads": 4}
    text = {"vocab_size": 200, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**tower, **text}, vision_config={**tower, "image_size": 32, "patch_size": 8}
        )
    ).eval()


def contrastive(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """CLIP's own loss: each image belongs to its text."""
    return model(**batch, return_loss=True).loss


def pairs(seed: int, count: int = 16) -> dict[str, Tensor]:
    """Images of one of eight gray values, and texts that name it: something for the towers to agree on."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.arange(count) % 8
    image = (kind.view(-1, 1, 1, 1) - 3.5) / 4 + 0.3 * torch.randn(count, 3, 32, 32, generator=generator)
    text = torch.randint(100, 199, (count, 16), generator=generator)
    text[:, 1] = 10 + kind
    text[:, -1] = 1
    return {"input_ids": text, "pixel_values": image}


def main() -> None:
    """Train briefly, prune half of the weights with and without layers' own shares, then make a smaller model."""
    given = options(__doc__)
    torch.manual_seed(0)
    model = clip(given.small)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(3 if given.small else 150):
        loss = contrastive(model.train(), pairs(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    data, held_out = [pairs(10_000 + k) for k in range(2 if given.small else 4)], [pairs(20_000 + k) for k in range(8)]
    layers = ("*encoder.layers*",)

    def quality(net: nn.Module) -> float:
        with torch.inference_mode():
            return sum(float(contrastive(net, batch)) for batch in held_out) / len(held_out)

    same, own = copy.deepcopy(model), copy.deepcopy(model)
    secateur.prune(same, "wanda", sparsity=0.5, data=data, only=layers)
    made = ecoflap(own, data, contrastive, sparsity=0.5, only=layers)
    spread = [record.sparsity for record in made.records]
    print(
        f"CLIP's loss: dense {quality(model):.3f}; half of the weights gone: the same share everywhere "
        f"{quality(same):.3f}, ecoflap's shares ({min(spread):.0%} to {max(spread):.0%}) {quality(own):.3f}"
    )
    smaller(model, "group-norm", "flops 30%", pairs(1, 2), lambda: clip(given.small))


if __name__ == "__main__":
    main()
