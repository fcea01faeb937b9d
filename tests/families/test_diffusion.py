"""Steps of the noise: which are taken, and what is made of an image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.errors import DataError, RecipeError
from secateur.families import denoising, diffusion_steps


class Known(nn.Module):
    """Is wrong about the noise by a known amount at each step."""

    def __init__(self, errors: list[float], noise: Tensor) -> None:
        super().__init__()
        self.errors, self.noise = errors, noise

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.noise + self.errors[int(timestep[0])] ** 0.5


def noise(seed: int = 0) -> Tensor:
    return torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_steps_end_at_the_first_below_the_share_of_the_largest_loss() -> None:
    kept = torch.linspace(0.99, 0.01, 6)
    model = Known([1.0, 2.0, 0.5, 0.09, 5.0, 5.0], noise())
    steps = diffusion_steps(model, torch.ones(2, 1, 4, 4), kept, threshold=0.05)
    assert [int(s["timestep"][0]) for s in steps] == [0, 1, 2, 3]  # 0.09 < 0.05 * 2, that step included
    losses = [float(denoising(model, s)) for s in steps]
    assert losses == pytest.approx([1.0, 2.0, 0.5, 0.09], rel=1e-4)
    assert len(diffusion_steps(model, torch.ones(2, 1, 4, 4), kept, threshold=0.0, stride=2)) == 3


def test_what_is_made_of_an_image_has_the_share_of_variance_that_the_schedule_says() -> None:
    clean, kept = torch.full((2, 1, 4, 4), 3.0), torch.tensor([0.64])
    (step,) = diffusion_steps(Known([1.0], noise(7)), clean, kept, threshold=0.0, seed=7)
    assert torch.allclose(step["sample"], 0.8 * clean + 0.6 * noise(7))
    assert torch.equal(step["noise"], noise(7))


def test_bad_input() -> None:
    model = Known([1.0], noise())
    with pytest.raises(RecipeError, match="share of the largest loss"):
        diffusion_steps(model, torch.ones(2, 1, 4, 4), torch.tensor([0.5]), threshold=1.0)
    with pytest.raises(RecipeError, match="stride is 0"):
        diffusion_steps(model, torch.ones(2, 1, 4, 4), torch.tensor([0.5]), stride=0)
    with pytest.raises(DataError, match="one number in"):
        diffusion_steps(model, torch.ones(2, 1, 4, 4), torch.tensor([5.0, 2.0]))


def test_diff_pruning_is_taylor_summed_over_the_steps() -> None:
    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.two(self.one(sample).relu())

    torch.manual_seed(0)
    model, kept = Denoiser(), torch.linspace(0.99, 0.1, 4)
    steps = diffusion_steps(model, torch.randn(2, 1, 4, 4), kept, threshold=0.0)
    gradients = [torch.zeros_like(p) for p in model.parameters()]
    for step in steps:
        for total, new in zip(gradients, torch.autograd.grad(denoising(model, step), model.parameters()), strict=True):
            total += new
    weight = dict(zip(dict(model.named_parameters()), gradients, strict=True))
    score = (model.one.weight * weight["one.weight"]).abs().sum((1, 2, 3))
    score = score + (model.two.weight * weight["two.weight"]).abs().sum((0, 2, 3))  # biases are not scored
    example = {"sample": steps[0]["sample"], "timestep": steps[0]["timestep"]}
    plan = secateur.plan(
        model, "diff-pruning", target="params 50%", example=example, data=steps, loss=denoising, multiple=1,
        recovery="none",
    )  # fmt: skip
    small = plan.shrink()
    stay = score.topk(small.one.out_channels).indices.sort().values
    assert 0 < small.one.out_channels < 8
    assert torch.equal(small.one.weight, model.one.weight[stay])
