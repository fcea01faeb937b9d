"""Speech: convolutions over time, heads and neurons of a Wav2Vec2 (from its config), and an LSTM behind convolutions.

python examples/speech.py
"""

from __future__ import annotations

import torch
import transformers
from common import options, smaller
from torch import Tensor, nn


def wav2vec2(small: bool) -> transformers.Wav2Vec2ForCTC:
    """From the config: fresh weights, real architecture."""
    width, depth = (32, 2) if small else (192, 4)
    config = transformers.Wav2Vec2Config(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=4, intermediate_size=2 * width,
        conv_dim=[width // 2] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, vocab_size=32,
        mask_time_prob=0.0,
    )  # fmt: skip
    return transformers.Wav2Vec2ForCTC(config).eval()


class Detector(nn.Module):
    """Is someone speaking? Convolutions over the waveform, an LSTM, one number for each frame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv1d(1, width, 16, 8), nn.ReLU(), nn.Conv1d(width, 2 * width, 3), nn.ReLU()
        )
        self.lstm = nn.LSTM(2 * width, 2 * width, batch_first=True)
        self.out = nn.Linear(2 * width, 1)

    def forward(self, wave: Tensor) -> dict[str, Tensor]:
        hidden, _ = self.lstm(self.convolutions(wave).transpose(1, 2))
        return {"logits": self.out(hidden)}


def main() -> None:
    """Half of the FLOPs of each go; the LSTM's hidden units go with what reads and writes them."""
    given = options(__doc__)
    torch.manual_seed(0)
    wave = {"input_values": torch.randn(1, 4000 if given.small else 16000)}
    smaller(wav2vec2(given.small), "group-norm", "flops 50%", wave, lambda: wav2vec2(given.small))
    width = 16 if given.small else 64
    frames = {"wave": torch.randn(1, 1, 512 if given.small else 4096)}
    smaller(Detector(width).eval(), "group-norm", "flops 50%", frames, lambda: Detector(width))


if __name__ == "__main__":
    main()
