"""A vision transformer on Fashion-MNIST: heads and neurons, whole blocks, tokens, and heads with tokens.

apt-get install dataset-fashion-mnist
python examples/vision_transformer.py
"""

from __future__ import annotations

import torch
from common import options
from torch import nn

import secateur
from secateur.measure.flops import flops
from secateur.runtime.measured import measured
from secateur.tasks import find
from secateur.tasks.nets import VisionTransformer


def main() -> None:
    """Train briefly, then take away as much in four ways, without training."""
    given = options(__doc__)
    if given.small:  # no data: fresh weights, noise
        torch.manual_seed(0)
        model: nn.Module = VisionTransformer(16, 3).eval()
        tests = [(torch.randn(8, 1, 28, 28), torch.randint(0, 10, (8,)))]
        train = tests
    else:
        task = find("fashion-vit", images=6000, width=64)
        model = secateur.train(task, epochs=5).model
        tests, train = list(task.batches("test", 0, 0))[:8], list(task.batches("train", 0, 0))[:4]
    example = tests[0][0][:1]

    def show(name: str, net: nn.Module) -> None:
        with torch.inference_mode():
            right = sum(int((net(x).argmax(1) == y).sum()) for x, y in tests) / sum(len(y) for _, y in tests)
        print(f"{name:24} accuracy {right:.1%}, FLOPs x {flops(net, example).total / flops(model, example).total:.2f}")

    show("dense", model)
    data = [x for x, _ in train]
    heads = secateur.plan(model, "wanda-sp", target="flops 30%", example=example, data=data).shrink().eval()
    show("heads and neurons", heads)
    blocks = secateur.plan(model, "shortgpt", target="flops 30%", example=example, data=data).shrink().eval()
    show("blocks", blocks)
    tokens = secateur.prune(model, "tome", target="flops 30%", example=example)
    show("tokens", tokens)
    both = secateur.prune(heads, "tome", target="flops 20%", example=example)
    show("heads, neurons, tokens", both)
    print(f"tokens: {measured(tokens, tests[:2], repeats=1)['ratio']:.2f} times as fast here, in batches")


if __name__ == "__main__":
    main()
