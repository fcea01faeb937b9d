"""Deep compression of a convolutional network, from Python and from the command line."""

from __future__ import annotations

from pathlib import Path

import torch
from tests.conftest import Run
from torch import nn

import secateur
from secateur.sources import sources

NET = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 3), nn.Flatten(), nn.Linear(512, 10),
    )
"""


def made(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(NET)
    return tmp_path / "nets.py"


def test_a_network_from_the_command_line(tmp_path: Path, run: Run) -> None:
    file = made(tmp_path)
    words = ("--method", "deep-compression", "--sparsity", 0.8, "--set", "solver.bits=4", "--out", tmp_path / "o")
    status, _, error = run("prune", f"{file}:net", *words)
    assert status == 0, error
    assert not list((tmp_path / "o").glob("m*.safetensors"))  # neither floats nor masks
    (source,) = sources(str(tmp_path / "o"), f"{file}:net", alone=True)
    assert source.kind == "stored" and source.directory == tmp_path / "o"
    net = source.load()
    dense = sources(f"{file}:net", alone=True)[0].load()
    x = torch.randn(2, 3, 8, 8)
    for (name, p), q in zip(net.named_parameters(), dense.parameters(), strict=True):
        if p.dim() > 1:
            assert int(p.count_nonzero()) == round(0.2 * p.numel()) and len(p.unique()) <= 17, name
            away = (p - q).detach()[p != 0].abs().max()
            assert float(away) < 0.5 * float(q.detach().abs().max()), "values are near what they stand for"
    assert torch.isfinite(net(x)).all()
    size = sum(f.stat().st_size for f in (tmp_path / "o").glob("*.safetensors"))
    assert size < 0.16 * sum(4 * p.numel() for p in dense.parameters())


def test_integers_of_a_network(tmp_path: Path) -> None:
    """All kinds of layers, with tied weights: the same model comes back, whatever form each took."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(16, 8)
            self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
            self.up = nn.ConvTranspose1d(8, 8, 1)
            self.head = nn.Linear(8, 16, bias=False)
            self.head.weight = self.table.weight

    net = Tied()
    pruned = secateur.prune(net, secateur.Recipe.of("magnitude", sparsity=0.5).quantized("int4:4"))
    pruned.save(tmp_path / "o", storage="smallest")
    again = secateur.load(tmp_path / "o", Tied())
    assert again.head.weight is again.table.weight
    for (name, p), q in zip(net.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(p, q[1]), name
