"""A detector: channels, heads and neurons of a DETR (from its config), and of a network for segmentation.

python examples/detector.py
"""

from __future__ import annotations

import torch
import transformers
from common import options, smaller


def detector(small: bool) -> transformers.PreTrainedModel:
    """DETR with a ResNet in front; fresh weights, real architecture."""
    width = 32 if small else 64
    backbone = transformers.ResNetConfig(
        embedding_size=width // 2,
        hidden_sizes=[width // 2, width, 2 * width, 2 * width],
        depths=[1, 1, 1, 1],
        out_features=["stage4"],
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone,
        d_model=width, encoder_layers=1 if small else 3, decoder_layers=1 if small else 3,
        encoder_ffn_dim=2 * width, decoder_ffn_dim=2 * width, encoder_attention_heads=4, decoder_attention_heads=4,
        num_queries=10,
    )  # fmt: skip
    return transformers.DetrForObjectDetection(config).eval()


def main() -> None:
    """Cut half of the FLOPs away; boxes and classes keep their places."""
    given = options(__doc__)
    torch.manual_seed(0)
    example = {"pixel_values": torch.randn(1, 3, *([64, 64] if given.small else [256, 256]))}
    model = detector(given.small)
    small = smaller(model, "group-norm", "flops 50%", example, lambda: detector(given.small))
    with torch.inference_mode():
        found = small(**example)
    assert found.pred_boxes.shape == (1, 10, 4) and found.logits.shape == model(**example).logits.shape


if __name__ == "__main__":
    main()
