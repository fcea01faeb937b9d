"""A diffusion U-Net: Diff-Pruning, Taylor over the steps whose loss still says something, then a short fine-tune.

pip install diffusers
python examples/diffusion.py
"""

from __future__ import annotations

import torch
from common import options, smaller
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from secateur.families import denoising, diffusion_steps
from secateur.tasks import find


def unet(small: bool) -> UNet2DModel:
    """A denoiser for images of 16 x 16 with attention on the inner level."""
    widths = (8, 16) if small else (32, 64)
    return UNet2DModel(
        sample_size=16, in_channels=1, out_channels=1, block_out_channels=widths, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )  # fmt: skip


def images(count: int) -> Tensor:
    """Handwritten digits of scikit-learn, 8 x 8, enlarged, in [-1, 1]."""
    batches = find("digits").batches("train", 0, 0)
    found = torch.cat([inputs for inputs, _ in batches])[:count].view(-1, 1, 8, 8)
    found = nn.functional.interpolate(found, size=16, mode="bilinear")
    return 2 * (found - found.min()) / (found.max() - found.min()) - 1


def train(model: nn.Module, clean: Tensor, kept: Tensor, steps: int, rate: float = 1e-3) -> float:
    """Learn to predict the noise; returns the loss on noise that is the same for every model."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(clean), (32,), generator=generator)
        step = torch.randint(len(kept), (32,), generator=generator)
        noise, share = torch.randn(32, 1, 16, 16, generator=generator), kept[step].view(-1, 1, 1, 1)
        sample = share.sqrt() * clean[rows] + (1 - share).sqrt() * noise
        loss = denoising(model, {"sample": sample, "timestep": step, "noise": noise})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    tests = diffusion_steps(model, clean[:64], kept, threshold=0.0, stride=max(1, len(kept) // 10), seed=1)
    with torch.inference_mode():
        return sum(float(denoising(model, batch)) for batch in tests) / len(tests)


def main() -> None:
    """Train a denoiser, cut it by Diff-Pruning, train it a little more."""
    given = options(__doc__)
    torch.manual_seed(0)
    clean, kept = images(64 if given.small else 1000), DDPMScheduler(1000).alphas_cumprod
    model, steps = unet(given.small), 2 if given.small else 400
    dense = train(model, clean, kept, steps)
    data = diffusion_steps(model, clean[:32], kept, threshold=0.05, stride=250 if given.small else 20)
    example = {"sample": clean[:1], "timestep": torch.tensor([3])}
    small = smaller(
        model, "diff-pruning", "flops 40%", example, lambda: unet(given.small), data=data, loss=denoising,
        recovery="none",
    )  # fmt: skip
    cut = train(small, clean, kept, 0)
    print(
        f"loss of the noise: dense {dense:.4f}, cut {cut:.4f}, after {steps // 4} steps of training "
        f"{train(small, clean, kept, steps // 4):.4f}; {len(data)} steps of the noise were looked at"
    )


if __name__ == "__main__":
    main()
