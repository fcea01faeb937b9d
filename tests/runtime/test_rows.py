"""Which tensors have a row for each input: never decided by sizes that happen to be equal."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import ModelError
from secateur.runtime import skipnet
from secateur.runtime.exits import early_exit
from secateur.runtime.rows import Rows, having

from .models import BiasedClassifier, vectors


def biased(heads: int = 2) -> BiasedClassifier:
    torch.manual_seed(0)
    return BiasedClassifier(heads).eval()


def bias(*sizes: int) -> Tensor:
    return 3 * torch.randn(*sizes, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("inputs", "sizes"), [(6, (6, 6)), (2, (2, 6, 6)), (3, (6, 6)), (3, (3, 1, 6, 6)), (1, (6, 6))]
)
def test_an_argument_has_rows_where_one_more_input_gives_it_one_more(inputs: int, sizes: tuple[int, ...]) -> None:
    found = having(biased(), ((vectors(inputs, 6),), {"bias": bias(*sizes)}))
    assert found == ({".0.0", ".1.bias"} if len(sizes) == 4 else {".0.0"})


@pytest.mark.parametrize("sizes", [(6, 6), (2, 6, 6), (6, 1, 6, 6)], ids=["tokens", "heads", "inputs"])
@pytest.mark.parametrize("inputs", [6, 2])
def test_exits_and_skips_cut_what_has_rows_and_nothing_else(inputs: int, sizes: tuple[int, ...]) -> None:
    shared = len(sizes) < 4
    x, mask = vectors(inputs, 6), bias(*sizes) if shared else bias(inputs, *sizes[1:])
    one = lambda k: mask if shared else mask[k : k + 1]  # noqa: E731
    gates = early_exit(biased(), (x, mask)).eval()
    for p in gates.exits.parameters():
        nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        said = gates.through(x, mask)[1]
        gates.threshold = float(torch.distributions.Categorical(logits=torch.stack(said)).entropy().quantile(0.47))
        out, where = gates.run(x, mask)
        alone = [gates.run(x[k : k + 1], one(k)) for k in range(inputs)]
    assert len(set(where.tolist())) > 1 and where.tolist() == [int(w) for _, w in alone]
    torch.testing.assert_close(out, torch.cat([o for o, _ in alone]), rtol=1e-4, atol=1e-5)

    skips = skipnet(biased(), (x, mask)).eval()
    for k, gate in enumerate(skips.gates.values()):
        nn.init.normal_(gate.out.weight, std=30, generator=torch.Generator().manual_seed(k))
        nn.init.zeros_(gate.out.bias)
    skips = copy.deepcopy(skips)
    with torch.no_grad():
        out, ran = skips.run(x, mask)
        alone = [skips.run(x[k : k + 1], one(k)) for k in range(inputs)]
    assert 0 < float(ran.float().mean()) < 1 and torch.equal(ran, torch.cat([r for _, r in alone]))
    torch.testing.assert_close(out, torch.cat([o for o, _ in alone]), rtol=1e-4, atol=1e-5)


def test_nothing_runs_twice_where_sizes_tell() -> None:
    calls: list[int] = []
    net = biased()
    net.register_forward_pre_hook(lambda *_: calls.append(1))
    rows, x = Rows(net, ["blocks.0"]), vectors(6, 4)
    call = ((x, bias(4, 4)), {})
    args, kwargs = rows.taken((call[0], {}), "blocks.0 takes", 6, torch.tensor([1, 4]), call)
    assert calls == [] and torch.equal(args[0], x[[1, 4]]) and args[1] is call[0][1] and kwargs == {}


def test_a_model_of_one_batch_size_is_told() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x.view(2, 3) + y

    with pytest.raises(ModelError, match="does not run on 3 inputs where it runs on 2"):
        having(Fixed(), ((torch.ones(2, 3), torch.ones(2, 3)), {}))
