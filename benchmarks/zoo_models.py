"""The models of the zoo: timm names, transformers families from tiny configs, grouped-query ratios. Random weights.

An entry is ``timm:NAME``, ``hf:FAMILY``, ``gqa:RATIO[:cache]`` (query heads to a key-value head, or ``mqa``; traced
with a key-value cache or without) or ``none:linear``, a model of which nothing can go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VOCAB, LABELS, LENGTH = 100, 10, 12


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        build: seed -> the model in evaluation mode.
        inputs: seed -> a tensor, or keyword inputs.
        classes: output sizes by which the layer of the head is known.
        kind: ``vision``, ``encoder``, ``decoder`` and so on: which recipe the peer's examples have for it.
    """

    name: str
    build: Callable[[int], nn.Module]
    inputs: Callable[[int], Any]
    classes: tuple[int, ...]
    kind: str


def names(given: list[str]) -> list[str]:
    """Entries as they are, and those of a file with an entry a line; ``#`` begins a comment."""
    found: list[str] = []
    for entry in given:
        lines = Path(entry).read_text(encoding="utf-8").splitlines() if Path(entry).is_file() else [entry]
        found += [x for line in lines if (x := line.partition("#")[0].strip())]
    return list(dict.fromkeys(found))


def case(name: str) -> Case:
    """The model of an entry."""
    kind, _, rest = name.partition(":")
    if kind == "timm":
        return timm_case(name, rest)
    if kind == "hf" and rest in FAMILIES:
        return hf_case(name, rest)
    if kind == "gqa":
        return grouped_case(name, rest)
    if name == "none:linear":
        return Case(name, lambda x: seeded(x, lambda: nn.Linear(16, 8)), lambda x: noise(x, 1, 16), (8,), kind)
    raise ValueError(f"no model '{name}': write timm:NAME, hf:FAMILY, gqa:RATIO[:cache] or none:linear")


def seeded(seed: int, make: Callable[[], Any]) -> Any:
    torch.manual_seed(seed)
    return make().eval()


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(seed: int, length: int = LENGTH) -> Tensor:
    """One sequence without special tokens."""
    return torch.randint(5, VOCAB - 5, (1, length), generator=torch.Generator().manual_seed(seed))


def timm_case(name: str, model: str) -> Case:
    """Inputs have the size that the architecture is made for, but at most 256 pixels a side where it takes less."""
    import timm

    if not timm.is_model(model):
        raise ValueError(f"timm knows no model '{model}'")
    config = timm.get_pretrained_cfg(model)
    channels, size, fixed, least = 3, 224, False, 0
    if config is not None:
        channels, size, fixed = config.input_size[0], config.input_size[-1], bool(config.fixed_input_size)
        least = max(config.min_input_size[-1] if config.min_input_size else 0, 0)
    given: dict[str, Any] = {}
    if size > 256:
        if fixed:
            given["img_size"] = 224  # position embeddings are made for it
        size = max(224, least)

    def build(seed: int) -> nn.Module:
        made: nn.Module = seeded(seed, lambda: timm.create_model(model, pretrained=False, **given))
        return made

    classes = (config.num_classes if config is not None else 0) or 1000
    return Case(name, build, lambda seed: noise(seed, 1, channels, size, size), (classes,), "vision")


def grouped_case(name: str, rest: str) -> Case:
    """A small Llama with 16 query heads."""
    ratio, _, cache = rest.partition(":")
    heads, hidden = 16, 128
    try:
        groups = 1 if ratio == "mqa" else heads // int(ratio)
    except (ValueError, ZeroDivisionError):
        groups = 0
    if groups < 1 or (ratio != "mqa" and groups * int(ratio) != heads) or cache not in ("", "cache"):
        raise ValueError(f"'{name}': the ratio is a divisor of {heads} or 'mqa', then ':cache' or nothing")
    given = sizes(hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=groups)
    return hf_case(name, "llama", cache=bool(cache), **given)


def sizes(**given: Any) -> dict[str, Any]:
    return given


def family(kind: str, model: str, config: str, *bases: dict[str, Any], **given: Any) -> Family:
    merged = {k: v for base in (*bases, given) for k, v in base.items()}
    return model, f"{config}Config", merged, kind


Family = tuple[str, str, dict[str, Any], str]
SPECIAL = sizes(bos_token_id=0, eos_token_id=1, pad_token_id=2)
BLOCKS = sizes(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
TEXT = {**BLOCKS, **SPECIAL, "vocab_size": VOCAB, "max_position_embeddings": 64}
GROUPED = {**TEXT, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}
SHORT = {**SPECIAL, "hidden_size": 64, "vocab_size": VOCAB}
LABELLED = {**TEXT, "num_labels": LABELS}
PIXELS = {**BLOCKS, "image_size": 32, "patch_size": 8}
VISION = {**PIXELS, "num_labels": LABELS}
STAGES = sizes(hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 2, 1], num_labels=LABELS)
BOTH = sizes(d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
BOTH |= sizes(encoder_ffn_dim=128, decoder_ffn_dim=128)
WORDS = {**BOTH, **SPECIAL, "vocab_size": VOCAB, "decoder_start_token_id": 2}
BACKBONE = sizes(backbone=None, use_pretrained_backbone=False, num_labels=LABELS)
SAM = sizes(
    vision_config={**PIXELS, "image_size": 64, "output_channels": 32, "window_size": 4, "mlp_dim": 128}
    | sizes(global_attn_indexes=[1], num_pos_feats=16),
    prompt_encoder_config=sizes(hidden_size=32, image_size=64, patch_size=8, mask_input_channels=8),
    mask_decoder_config=sizes(hidden_size=32, mlp_dim=64, num_attention_heads=4, iou_head_hidden_dim=32),
)
SPEECH = sizes(conv_dim=[32, 32, 32], conv_kernel=[10, 3, 3], conv_stride=[5, 2, 2], num_feat_extract_layers=3)
SPEECH |= sizes(num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, mask_time_prob=0.0)
LM, CLASSIFIER, SEQ2SEQ = "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModelForSeq2SeqLM"
IMAGE = "AutoModelForImageClassification"

#: Family -> (model class, config class, its arguments, kind).
FAMILIES: dict[str, Family] = {
    "llama": family("decoder", LM, "Llama", GROUPED),
    "qwen2": family("decoder", LM, "Qwen2", GROUPED),
    "qwen3": family("decoder", LM, "Qwen3", GROUPED),
    "qwen3-moe": family(
        "decoder", LM, "Qwen3Moe", GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "mixtral": family("decoder", LM, "Mixtral", GROUPED, num_local_experts=4),
    "mistral": family("decoder", LM, "Mistral", GROUPED, sliding_window=8),
    "gemma2": family("decoder", LM, "Gemma2", GROUPED, sliding_window=8),
    "gemma3": family("decoder", LM, "Gemma3Text", GROUPED, sliding_window=8),
    "phi3": family("decoder", LM, "Phi3", GROUPED),
    "gpt2": family("decoder", LM, "GPT2", SPECIAL, n_embd=64, n_layer=2, n_head=4, n_positions=64, vocab_size=VOCAB),
    "gpt-neox": family("decoder", LM, "GPTNeoX", TEXT),
    "opt": family("decoder", LM, "OPT", TEXT, ffn_dim=128, word_embed_proj_dim=64),
    "bloom": family("decoder", LM, "Bloom", SHORT, n_layer=2, n_head=4),
    "falcon": family("decoder", LM, "Falcon", SHORT, num_hidden_layers=2, num_attention_heads=4, alibi=False),
    "mamba": family("decoder", LM, "Mamba", SHORT, num_hidden_layers=2, state_size=8),
    "bert": family("encoder", CLASSIFIER, "Bert", LABELLED),
    "roberta": family("encoder", CLASSIFIER, "Roberta", LABELLED),
    "deberta-v2": family(
        "encoder", CLASSIFIER, "DebertaV2", LABELLED, relative_attention=True, pos_att_type=["p2c", "c2p"]
    ),
    "albert": family("encoder", CLASSIFIER, "Albert", LABELLED, embedding_size=32),
    "distilbert": family("encoder", CLASSIFIER, "DistilBert", LABELLED, dim=64, hidden_dim=128, n_layers=2, n_heads=4),
    "electra": family("encoder", CLASSIFIER, "Electra", LABELLED, embedding_size=32),
    "t5": family("seq2seq", SEQ2SEQ, "T5", WORDS, d_ff=128, d_kv=16, num_layers=2, num_heads=4),
    "bart": family("seq2seq", SEQ2SEQ, "Bart", WORDS, max_position_embeddings=64),
    "marian": family("seq2seq", SEQ2SEQ, "Marian", WORDS, max_position_embeddings=64),
    "whisper": family(
        "speech2seq",
        "WhisperForConditionalGeneration",
        "Whisper",
        WORDS,
        sizes(num_mel_bins=16, max_source_positions=30, max_target_positions=32),
    ),
    "vit": family("vision", IMAGE, "ViT", VISION),
    "deit": family("vision", "DeiTForImageClassification", "DeiT", VISION),
    "beit": family("vision", IMAGE, "Beit", VISION, use_relative_position_bias=True),
    "swin": family(
        "vision",
        IMAGE,
        "Swin",
        sizes(image_size=32, patch_size=2, embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4),
        num_labels=LABELS,
    ),
    "dinov2": family("vision", IMAGE, "Dinov2", VISION),
    "convnext": family("vision", IMAGE, "ConvNext", STAGES),
    "resnet": family("vision", IMAGE, "ResNet", STAGES, embedding_size=16),
    "mobilenetv2": family("vision", IMAGE, "MobileNetV2", image_size=64, num_labels=LABELS),
    "segformer": family("vision", IMAGE, "Segformer", STAGES, depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 4, 4]),
    "detr": family(
        "vision",
        "DetrForObjectDetection",
        "Detr",
        {**BOTH, **BACKBONE},
        sizes(num_queries=6, use_timm_backbone=False, backbone_config="resnet"),
    ),
    "clip": family("contrastive", "CLIPModel", "CLIP", text_config=TEXT, vision_config=PIXELS, projection_dim=32),
    "siglip": family("contrastive", "SiglipModel", "Siglip", text_config=TEXT, vision_config=PIXELS),
    "sam": family("segmentation", "SamModel", "Sam", SAM),
    "upernet": family(
        "vision",
        "UperNetForSemanticSegmentation",
        "UperNet",
        {**BACKBONE, "hidden_size": 32, "backbone_config": "convnext"},
        sizes(auxiliary_in_channels=64, auxiliary_channels=32, pool_scales=[1, 2]),
    ),
    "wav2vec2": family("speech", "Wav2Vec2ForCTC", "Wav2Vec2", TEXT, SPEECH),
}
BACKBONES = {"resnet": "ResNetConfig", "convnext": "ConvNextConfig"}


def hf_case(name: str, which: str, cache: bool = False, **overrides: Any) -> Case:
    """A transformers family from its config."""
    import transformers

    model, config, kwargs, kind = FAMILIES[which]

    def build(seed: int) -> nn.Module:
        given = {**kwargs, **overrides}
        if backbone := given.get("backbone_config"):
            widths = {k: v for k, v in FAMILIES[backbone][2].items() if k != "num_labels"}
            stages = [f"stage{i}" for i in ((4,) if which == "detr" else (1, 2, 3, 4))]
            given["backbone_config"] = getattr(transformers, BACKBONES[backbone])(**widths, out_features=stages)
        made = getattr(transformers, config)(**given)
        chosen = getattr(transformers, model)
        return seeded(seed, lambda: chosen.from_config(made) if model.startswith("Auto") else chosen(made))

    return Case(name, build, lambda seed: hf_inputs(which, kind, seed, cache), (LABELS, LABELS + 1, VOCAB), kind)


def hf_inputs(which: str, kind: str, seed: int, cache: bool) -> dict[str, Any]:
    """Keyword inputs, a batch of one."""
    ids = tokens(seed)
    if kind == "decoder":
        return {"input_ids": ids, "use_cache": cache}
    if kind == "encoder":
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "seq2seq":
        return {"input_ids": ids, "decoder_input_ids": tokens(seed + 1, 7), "use_cache": cache}
    if kind == "speech2seq":
        return {"input_features": noise(seed, 1, 16, 60), "decoder_input_ids": tokens(seed + 1, 7), "use_cache": cache}
    if kind == "speech":
        return {"input_values": noise(seed, 1, 1600)}
    if kind == "contrastive":
        return {"input_ids": ids, "pixel_values": noise(seed, 1, 3, 32, 32)}
    if kind == "segmentation":
        points = 60 * torch.rand(1, 1, 2, 2, generator=torch.Generator().manual_seed(seed))
        return {"pixel_values": noise(seed, 1, 3, 64, 64), "input_points": points}
    size = {"vit": 32, "deit": 32, "beit": 32, "swin": 32, "dinov2": 32}.get(which, 64)
    return {"pixel_values": noise(seed, 1, 3, size, size)}
