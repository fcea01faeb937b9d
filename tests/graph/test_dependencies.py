"""Units of small networks, written out by hand: which positions of which tensors go together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests import nets
from torch import Tensor, nn

from secateur.graph import Dependencies, dependencies, trace

#: What a batch norm called ``b`` has at channel ``i``: " b@i" in a template.
BATCH_NORM = "{0}.weight:0[{1}] {0}.bias:0[{1}] {0}.running_mean:0[{1}] {0}.running_var:0[{1}]"


def analysis(model: nn.Module, example: Any) -> Dependencies:
    args, kwargs = ((), example) if isinstance(example, Mapping) else ((example,), {})
    return dependencies(trace(model, args, kwargs))


def units(found: Dependencies) -> set[frozenset[str]]:
    """Every unit as words ``tensor:axis[positions]``."""
    return {
        frozenset(
            f"{found.slots[i].names[0]}:{found.slots[i].axis}{p.tolist()}".replace(" ", "")
            for i, p in unit.places.items()
        )
        for family in found.families
        for unit in family.units
    }


def words(text: str) -> frozenset[str]:
    """A unit by hand: words, where ``norm@i`` stands for a batch norm's four tensors."""
    found: list[str] = []
    for word in text.split():
        name, at, position = word.partition("@")
        found += BATCH_NORM.format(name, position).split() if at else [word]
    return frozenset(found)


def check(name: str, expected: Iterable[str], frozen: Mapping[tuple[str, int], str] | None = None) -> Dependencies:
    """The units are these and no others; the reasons of some frozen axes hold these words."""
    found = analysis(*nets.build(name))
    assert units(found) == {words(text) for text in expected}
    for key, why in (frozen or {}).items():
        assert why in found.frozen[key]
    return found


def test_residual_connections_tie_the_channels_of_all_that_is_added() -> None:
    skip = [
        f"stem.weight:0[{i}] stem.bias:0[{i}] b0@{i} c1.weight:1[{i}] c2.weight:0[{i}] b2@{i} head.weight:1[{i}]"
        for i in range(8)
    ]
    inner = [f"c1.weight:0[{i}] b1@{i} c2.weight:1[{i}]" for i in range(6)]
    found = check(
        "residual",
        [*skip, *inner],
        {
            ("stem.weight", 1): "positions",
            ("stem.weight", 2): "kernel",
            ("head.weight", 0): "output of the model",
            ("head.bias", 0): "output of the model",
        },
    )
    assert [(f.name, len(f)) for f in found.families] == [("stem.weight:0", 8), ("c1.weight:0", 6)]


def test_concatenation_moves_positions_behind_each_other() -> None:
    check(
        "concat",
        [
            *(
                f"a.weight:0[{i}] a.bias:0[{i}] b.weight:1[{i}] n@{i} c.weight:1[{i}] head.weight:1[{i}]"
                for i in range(4)
            ),
            *(f"b.weight:0[{i}] b.bias:0[{i}] n@{4 + i} c.weight:1[{4 + i}] head.weight:1[{4 + i}]" for i in range(6)),
            *(f"c.weight:0[{i}] c.bias:0[{i}] head.weight:1[{10 + i}]" for i in range(4)),
        ],
    )


def test_halves_that_are_multiplied_go_together() -> None:
    check("glu", [f"up.weight:0[{i},{8 + i}] up.bias:0[{i},{8 + i}] down.weight:1[{i}]" for i in range(8)])


def test_a_channel_shuffle_between_grouped_convolutions() -> None:
    # g1 makes (group g, within j) at 4g + j; the shuffle puts it at 2j + g, which g2 reads as (group, within).
    check(
        "shuffle",
        [
            *(  # one of g2's inputs in each of its groups: within 2m and 2m + 1 come from j = m and j = m + 2
                f"g1.weight:0[{m},{m + 2},{m + 4},{m + 6}] g1.bias:0[{m},{m + 2},{m + 4},{m + 6}] "
                f"g2.weight:1[{2 * m},{2 * m + 1}]"
                for m in range(2)
            ),
            *(  # a whole group of g2, with all that only it reads
                f"g1.weight:0[{a},{a + 1},{a + 4},{a + 5}] g1.bias:0[{a},{a + 1},{a + 4},{a + 5}] "
                f"g2.weight:0[{b},{b + 1},{b + 2},{b + 3}] g2.bias:0[{b},{b + 1},{b + 2},{b + 3}] "
                f"head.weight:1[{b},{b + 1},{b + 2},{b + 3}]"
                for a, b in ((0, 0), (2, 4))
            ),
            *(f"g2.weight:0[{j},{4 + j}] g2.bias:0[{j},{4 + j}] head.weight:1[{j},{4 + j}]" for j in range(4)),
        ],
    )


def test_a_depthwise_convolution_loses_whole_groups() -> None:
    check("depthwise", [f"e.weight:0[{i}] b@{i} d.weight:0[{i}] p.weight:1[{i}]" for i in range(8)])


def test_squeeze_and_excite_ties_the_gate_to_what_it_scales() -> None:
    check(
        "squeeze-excite",
        [
            *(
                f"c.weight:0[{i}] c.bias:0[{i}] r.weight:1[{i}] x.weight:0[{i}] x.bias:0[{i}] head.weight:1[{i}]"
                for i in range(8)
            ),
            *(f"r.weight:0[{i}] r.bias:0[{i}] x.weight:1[{i}]" for i in range(4)),
        ],
    )


def test_a_transposed_convolution_has_its_outputs_on_the_second_axis() -> None:
    check(
        "transposed",
        [
            *(f"a.weight:0[{i}] a.bias:0[{i}] t.weight:0[{i}]" for i in range(8)),
            *(f"t.weight:1[{i}] t.bias:0[{i}] b@{i} o.weight:1[{i}]" for i in range(6)),
        ],
    )


def test_flattening_spreads_a_channel_over_its_pixels() -> None:
    check(
        "vgg",
        [
            *(f"c1.weight:0[{i}] c1.bias:0[{i}] c2.weight:1[{i}]" for i in range(4)),
            *(
                f"c2.weight:0[{i}] c2.bias:0[{i}] f1.weight:1[{4 * i},{4 * i + 1},{4 * i + 2},{4 * i + 3}]"
                for i in range(6)
            ),
            *(f"f1.weight:0[{i}] f1.bias:0[{i}] f2.weight:1[{i}]" for i in range(10)),
        ],
    )


def everywhere(positions: str, *slots: str) -> str:
    return " ".join(f"{slot}[{positions}]" for slot in slots)


def test_group_norm_goes_by_groups_or_alike_in_all_groups() -> None:
    slots = ("a.weight:0", "a.bias:0", "n.weight:0", "n.bias:0", "b.weight:1")
    check(
        "group-norm",
        [
            *(everywhere(f"{2 * g},{2 * g + 1}", *slots) for g in range(4)),
            *(everywhere(f"{k},{2 + k},{4 + k},{6 + k}", *slots) for k in range(2)),
        ],
    )


def test_layer_norm_and_a_residual_stream() -> None:
    stream = ("a.weight:0", "a.bias:0", "n.weight:0", "n.bias:0", "f.weight:1", "g.weight:0", "g.bias:0", "o.weight:1")
    found = check(
        "layer-norm",
        [
            *(everywhere(str(i), *stream) for i in range(8)),
            *(everywhere(str(i), "f.weight:0", "f.bias:0", "g.weight:1") for i in range(12)),
        ],
    )
    assert len(found.trace.statistics) == 1  # the layer norm, over the stream


def runs(*starts: int, length: int = 4) -> str:
    return ",".join(str(s + k) for s in starts for k in range(length))


def test_heads_of_torch_multihead_attention() -> None:
    stream = ("i.weight:0", "i.bias:0", "m.in_proj_weight:1", "m.out_proj.weight:0", "m.out_proj.bias:0", "o.weight:1")
    check(
        "multihead",
        [
            *(everywhere(str(i), *stream) for i in range(8)),
            *(
                everywhere(runs(4 * h, 8 + 4 * h, 16 + 4 * h), "m.in_proj_weight:0", "m.in_proj_bias:0")
                + f" m.out_proj.weight:1[{runs(4 * h)}]"
                for h in range(2)
            ),
        ],
    )


@pytest.mark.parametrize("name", ["fused-qkv", "chunked-qkv"])
def test_heads_of_fused_queries_keys_and_values(name: str) -> None:
    stream = ("i.weight:0", "i.bias:0", "qkv.weight:1", "p.weight:0", "p.bias:0", "o.weight:1")
    check(
        name,
        [
            *(everywhere(str(i), *stream) for i in range(8)),
            *(
                everywhere(runs(4 * h, 8 + 4 * h, 16 + 4 * h), "qkv.weight:0", "qkv.bias:0")
                + f" p.weight:1[{runs(4 * h)}]"
                for h in range(2)
            ),
        ],
    )


STREAM = [everywhere(str(i), "i.weight:0", "i.bias:0", "q.weight:1", "k.weight:1", "v.weight:1") for i in range(8)]


def values(heads: int, kv: int) -> list[str]:
    """Dimensions of the values: alike in all heads."""
    of = {n: [",".join(str(4 * h + d) for h in range(n)) for d in range(4)] for n in (heads, kv)}
    return [everywhere(of[kv][d], "v.weight:0", "v.bias:0") + f" o.weight:1[{of[heads][d]}]" for d in range(4)]


@pytest.mark.parametrize("name", ["gqa", "gqa-fused"])
def test_grouped_queries_go_with_their_key_value_head(name: str) -> None:
    heads = [
        everywhere(runs(8 * g, 8 * g + 4), "q.weight:0", "q.bias:0")
        + " "
        + everywhere(runs(4 * g), "k.weight:0", "k.bias:0", "v.weight:0", "v.bias:0")
        + f" o.weight:1[{runs(8 * g, 8 * g + 4)}]"
        for g in range(2)
    ]
    expected = [*STREAM, *heads]
    if name == "gqa":  # the scale is a number of the model's own, so dimensions of queries and keys may go
        expected += values(4, 2)
        expected += [
            everywhere(f"{d},{4 + d},{8 + d},{12 + d}", "q.weight:0", "q.bias:0")
            + " "
            + everywhere(f"{d},{4 + d}", "k.weight:0", "k.bias:0")
            for d in range(4)
        ]
    check(name, expected)


class Scaled(nn.Module):
    """Fused attention whose scale is a number of the model's own; values may be wider than keys."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 2 * wide)
        self.o = nn.Linear(2 * wide, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (2, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, scale=0.5)
        out: Tensor = self.o(mixed.transpose(1, 2).flatten(-2))
        return out


@pytest.mark.parametrize("wide", [4, 6])
def test_values_stay_as_wide_as_keys_where_a_fused_kernel_wants_it(wide: int) -> None:
    """With values of another width there is no fused kernel to lose, and they are free."""
    found = analysis(Scaled(wide), torch.randn(1, 5, 6))
    together = [u for u in units(found) if any("q.weight" in x for x in u) and any("v.weight" in x for x in u)]
    whole = 2  # heads
    assert len(together) == whole + (4 if wide == 4 else 0)


def test_one_key_value_head_for_all_queries() -> None:
    heads = [everywhere(runs(4 * h), "q.weight:0", "q.bias:0", "o.weight:1") for h in range(4)]
    check("mqa-fused", [*STREAM, *heads], {("k.weight", 0): "root of the head's width"})


def test_tied_embeddings_lose_the_same_dimensions() -> None:
    found = check(
        "tied",
        [
            *(everywhere(str(i), "e.weight:1", "f.weight:1", "g.weight:0", "g.bias:0") for i in range(8)),
            *(everywhere(str(i), "f.weight:0", "f.bias:0", "g.weight:1") for i in range(12)),
        ],
        {("e.weight", 0): "vocabulary"},
    )
    assert [s.names for s in found.slots if "e.weight" in s.names] == [("e.weight", "out.weight")] * 2


def test_several_inputs_and_keywords() -> None:
    slots = ("a.weight:0", "a.bias:0", "b.weight:0", "b.bias:0", "o.weight:1")
    check("keyword", [everywhere(str(i), *slots) for i in range(8)], {("b.weight", 1): "positions"})


@pytest.mark.parametrize("name, gates", [("lstm", 4), ("gru", 3), ("rnn", 1)])
def test_recurrent_layers_lose_a_hidden_unit_in_every_gate(name: str, gates: int) -> None:
    hidden = [
        everywhere(
            ",".join(str(8 * g + i) for g in range(gates)),
            *("r.weight_ih_l0:0", "r.weight_hh_l0:0", "r.bias_ih_l0:0", "r.bias_hh_l0:0"),
        )
        + f" r.weight_hh_l0:1[{i}] o.weight:1[{i}]"
        for i in range(8)
    ]
    inputs = [everywhere(str(i), "i.weight:0", "i.bias:0", "r.weight_ih_l0:1") for i in range(6)]
    check(name, [*hidden, *inputs])


def test_tokens_stay_where_they_are_mixed() -> None:
    stream = ("e.weight:0", "e.bias:0", "n.weight:0", "n.bias:0", "c1.weight:1", "c2.weight:0", "c2.bias:0")
    check(
        "mixer",
        [
            *(everywhere(str(i), *stream, "o.weight:1") for i in range(8)),
            *(everywhere(str(i), "t1.weight:0", "t1.bias:0", "t2.weight:1") for i in range(10)),
            *(everywhere(str(i), "c1.weight:0", "c1.bias:0", "c2.weight:1") for i in range(12)),
        ],
        {("t2.weight", 0): "positions", ("t1.weight", 1): "positions"},
    )


def test_cross_attention_in_a_unet() -> None:
    found = units(analysis(*nets.build("unet")))
    heads = [everywhere(runs(4 * h), "x.q.weight:0", "x.k.weight:0", "x.v.weight:0", "x.o.weight:1") for h in range(4)]
    skip = ("a.weight:0", "a.bias:0", "n.weight:0", "n.bias:0", "d.weight:1", "u.weight:1")
    deep = ("d.weight:0", "d.bias:0", "m.weight:0", "m.bias:0", "x.q.weight:1", "x.o.weight:0", "x.o.bias:0")
    for unit in (
        *heads,
        *(everywhere(runs(2 * g, length=2), *skip) for g in range(4)),
        *(
            everywhere(runs(4 * g), *deep, "time.weight:0", "time.bias:0") + f" u.weight:1[{runs(8 + 4 * g)}]"
            for g in range(4)
        ),
    ):
        assert words(unit) in found


def test_of_a_single_layer_nothing_can_go() -> None:
    check("single", [], {("weight", 0): "output", ("bias", 0): "output", ("weight", 1): "positions"})


def test_a_layer_of_which_a_unit_is_everything_stays() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.b(y[..., 1:] * y[..., :-1])  # each position with the next, so all with all

    found = analysis(nets.Call(forward, a=nn.Linear(4, 5), b=nn.Linear(4, 3)), nets.noise(2, 4))
    assert not found.families and found.frozen["a.weight", 0].startswith("it is all of a.weight")


def test_the_parts_of_a_split_stay_equal() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = m.a(x).chunk(2, -1)
        return m.c(torch.cat([b, torch.tanh(a)], -1))

    model = nets.Call(forward, a=nn.Linear(3, 8), c=nn.Linear(8, 2))
    pairs = [everywhere(f"{i},{4 + i}", "a.weight:0", "a.bias:0", "c.weight:1") for i in range(4)]
    assert units(analysis(model, nets.noise(2, 3))) == {words(pair) for pair in pairs}


@torch.library.custom_op("secateur_test::twist", mutates_args=())
def twist(x: Tensor) -> Tensor:
    return x.flip(-1).clone()


def test_an_unknown_operation_freezes_what_it_reads_and_is_named() -> None:
    model = nets.Call(lambda m, x: m.c(F.relu(m.b(twist(m.a(x))))), a=nn.Linear(4, 8), b=nn.Linear(8, 6))
    model.c = nn.Linear(6, 3)
    found = analysis(model, nets.noise(2, 4))
    assert units(found) == {words(everywhere(str(i), "b.weight:0", "b.bias:0", "c.weight:1")) for i in range(6)}
    assert "secateur_test.twist" in found.frozen["a.weight", 0]
    assert list(found.trace.unknown) == ["secateur_test.twist.default"]


def test_a_fourier_transform_is_not_known() -> None:
    found = analysis(*nets.build("fourier"))
    assert "_fft_r2c" in found.frozen["a.weight", 0] and any("_fft_r2c" in name for name in found.trace.unknown)
    assert units(found) == {words(everywhere(str(i), "b.weight:0", "b.bias:0", "c.weight:1")) for i in range(6)}


def test_what_the_example_does_not_reach_stays() -> None:
    model, example = nets.build("keyword")
    found = analysis(model, {"x": example["x"]})
    assert not any("b.weight" in word for unit in units(found) for word in unit)


@pytest.mark.parametrize("name", nets.NETS)
def test_counts_of_parameters_and_of_what_goes(name: str) -> None:
    model, example = nets.build(name)
    found = analysis(model, example)
    assert found.parameters(frozenset()) == nets.parameters(model)
    flops = found.flops()
    for family in found.families:
        assert len({frozenset(u.gone) for u in family.units}) == len(family.units) >= 1
        for unit in family.units:
            kept = found.kept(unit.gone)
            assert kept.keys() == unit.places.keys()
            for slot, positions in unit.places.items():
                whole = sorted([*positions.tolist(), *kept[slot].tolist()])
                assert whole == list(range(len(found.slots[slot].labels)))
            assert found.parameters(unit.gone) < nets.parameters(model) and found.flops(unit.gone) <= flops


def test_a_trace_leaves_the_model_as_it_was() -> None:
    model, example = nets.build("residual")
    model.train()
    model.b1.eval()
    before, modes = nets.snapshot(model), [m.training for m in model.modules()]
    random = torch.get_rng_state()
    analysis(model, example)
    assert nets.same(before, model) and [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(random, torch.get_rng_state())
    broken = nets.Call(lambda m, x: m.a(x) + m.missing, a=nn.Linear(4, 3)).train()
    with pytest.raises(AttributeError):
        analysis(broken, nets.noise(2, 4))
    assert broken.a.training and not broken.a._forward_hooks
    assert torch.backends.mkldnn.enabled and torch.backends.mha.get_fastpath_enabled()
