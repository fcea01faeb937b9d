"""A classifier of images: filters before, during and after training, weights that share a budget, a smaller network.

apt-get install dataset-fashion-mnist
python examples/classifier.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from common import options

import secateur
from secateur.measure.latency import latency
from secateur.tasks import find


def main() -> None:
    """The same task, four ways; the structured one is written, read back, and measured."""
    given = options(__doc__)
    task = find("digits", epochs=1) if given.small else find("fashion-resnet", images=10000, epochs=3)
    print(secateur.train(task))
    for method, more in (
        ("snip", {"sparsity": 0.9}),  # before training
        ("rigl", {"sparsity": 0.9}),  # during
        ("magnitude-finetune", {"sparsity": 0.9}),  # after
    ):
        print(secateur.train(task, method, **more))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "small"
        made = secateur.train(task, "l1-norm", target="flops 50%", recovery="finetune", multiple=1, out=out)
        print(made)
        again = secateur.load(out, task.model(0)).eval()
        inputs = next(iter(task.batches("test", 0, 0)))[0][:4]
        with torch.inference_mode():
            assert torch.equal(again(inputs), made.model(inputs))
    took = latency({"dense": task.model(0), "small": again}, [inputs[:1]])
    print(f"{took['dense'] / took['small']:.2f} times as fast here, one image at a time")


if __name__ == "__main__":
    main()
