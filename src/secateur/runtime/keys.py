"""Methods by which entries leave the key-value cache of a decoder, without training."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..registry import register
from .decoder import PrunedDecoder, pruned_decoder, restored
from .policy import Policy

_WHERE = ("A3.6", "B3.6", "B4", "E4")


@register("transform", paper="2309.17453", survey=_WHERE, when="runtime", restore=restored, decodes=True)
def streaming(
    model: nn.Module,
    example: Any,
    *,
    budget: int | None = None,
    keep: float | None = None,
    sinks: int = 4,
    chunk: int | None = None,
) -> PrunedDecoder:
    """Keep the first few tokens and the last ones in the key-value cache of a decoder, and forget those between.

    :: cache = k_1..k_S, k_(n-B+S+1)..k_n, at positions 1..B

    ``budget`` entries stay in each head, or the fraction ``keep`` of all tokens so far, of which the first ``sinks``
    and the last ones. Positions are those in the cache: the keys of the first tokens are turned to right in front of
    the others (which gives the same distances as turning all others back). A prompt is attended in full, and pruned
    behind it; with ``chunk`` it goes through in pieces, between which entries leave.

    Choose it for texts without end in constant memory and time: no training, no data, no scores.

    Beware: what left is forgotten; it does not lengthen what the model can look back on. What it needs to turn keys is
    proven when it is made: rotary embeddings of a fixed base. Without them give ``sinks=0``, a plain window.

    >>> import torch, transformers
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    ... )
    >>> fast = streaming(transformers.LlamaForCausalLM(config), torch.arange(20)[None], budget=8)
    >>> _ = fast(torch.arange(20)[None])
    >>> fast.used.layers[0].position[0, 0].tolist()
    [0, 1, 2, 3, 16, 17, 18, 19]

    Source: Xiao et al., StreamingLLM, arXiv 2309.17453, section 3.2, and the official code, which evicts in front of a
    long input where this evicts behind it.
    """
    policy = Policy("token-recency", budget, keep, sinks=sinks, shift=sinks > 0)
    return _made(model, example, policy, chunk, "streaming")


@register("transform", paper="2306.14048", survey=_WHERE, when="runtime", restore=restored, decodes=True)
def h2o(
    model: nn.Module,
    example: Any,
    *,
    budget: int | None = None,
    keep: float | None = None,
    recent: float = 0.5,
    chunk: int | None = None,
) -> PrunedDecoder:
    """Keep the tokens that got the most attention so far, and the last ones, in the key-value cache of a decoder.

    :: s_i = sum over queries q so far of softmax(q k^T / sqrt(d))_i;  the largest stay, and the last ones

    ``budget`` entries stay in each head, or the fraction ``keep`` of all tokens so far. The share ``recent`` of them
    are the last ones; the others have the largest sums, which entries keep as long as they stay. Heads that share keys
    add up what their queries attend to. Positions are those in the text. A prompt is attended in full, and pruned
    behind it; with ``chunk`` it goes through in pieces, between which entries leave.

    Choose it where the text is longer than memory allows and what matters stands anywhere in it. No training, no data.

    Beware: attention weights are needed, so attention is computed step by step here, not by a fused kernel; a long
    prompt takes longer. Early tokens have had more queries to be seen by.

    >>> import torch, transformers
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    ... )
    >>> fast = h2o(transformers.LlamaForCausalLM(config), torch.arange(20)[None], keep=0.4)
    >>> _ = fast(torch.arange(20)[None])
    >>> fast.used.entries, sorted(fast.used.layers[0].position[0, 0].tolist())[-4:]
    ([8], [16, 17, 18, 19])

    Source: Zhang et al., H2O, arXiv 2306.14048, algorithm 1, and the official code (real drop); the sum over heads
    that share keys is ours.
    """
    return _made(model, example, Policy("attention-received", budget, keep, recent=recent), chunk, "h2o")


@register("transform", paper="2404.14469", survey=_WHERE, when="runtime", restore=restored, decodes=True)
def snapkv(
    model: nn.Module,
    example: Any,
    *,
    budget: int | None = None,
    keep: float | None = None,
    window: int = 32,
    smooth: int = 5,
) -> PrunedDecoder:
    """Keep what the end of the prompt attends to in the key-value cache of a decoder; what is generated stays.

    :: s_i = mean over i-2..i+2 of sum over the last W queries q of softmax(q k^T / sqrt(d))_i;  B - W stay

    Entries leave once, behind the prompt: ``budget`` stay in each head, or the fraction ``keep`` of the prompt, of
    which the last ``window``. The score is averaged over ``smooth`` neighbors, so that what stays are pieces of text.
    Heads that share keys add up what their queries attend to. Positions are those in the text.

    Choose it for long prompts with a question at the end, and short answers: the prompt costs next to nothing more.

    Beware: the cache grows by all that is generated. A prompt whose end says not what will be asked for loses it.

    >>> import torch, transformers
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    ... )
    >>> fast = snapkv(transformers.LlamaForCausalLM(config), torch.arange(20)[None], budget=8, window=4)
    >>> fast.generate(torch.arange(20)[None], max_new_tokens=4, do_sample=False).shape, fast.used.entries
    (torch.Size([1, 24]), [11])

    Source: Li et al., SnapKV, arXiv 2404.14469, section 4 and the official code (average pooling of 5, window of 32);
    the sum over heads that share keys is ours.
    """
    policy = Policy("attention-received", budget, keep, window=window, smooth=smooth, once=True)
    return _made(model, example, policy, None, "snapkv")


def _made(model: nn.Module, example: Any, policy: Policy, chunk: int | None, method: str) -> PrunedDecoder:
    found: PrunedDecoder = pruned_decoder(model, example, policy, chunk, {"method": method})
    return found
