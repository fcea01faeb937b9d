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

HIDDEN, LAYERS, HEADS, VOCAB, LABELS, LENGTH = 64, 2, 4, 128, 10, 12
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


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
        return Case(name, lambda seed: seeded(seed, lambda: nn.Linear(16, 8)), lambda seed: noise(seed, 1, 16), (), kind)
    raise SystemExit(f"no model '{name}': write timm:NAME, hf:FAMILY, gqa:RATIO[:cache] or none:linear")


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
        raise SystemExit(f"timm knows no model '{model}'")
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
        raise SystemExit(f"'{name}': the ratio is a divisor of {heads} or 'mqa', then ':cache' or nothing")
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": groups}
    return hf_case(name, "llama", cache=bool(cache), **sizes)


TEXT: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 2 * HIDDEN,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    **SPECIAL,
}
GQA: dict[str, Any] = {**TEXT, "num_key_value_heads": 2}
SHORT: dict[str, Any] = {"hidden_size": HIDDEN, "vocab_size": VOCAB, **SPECIAL}
ENCODER: dict[str, Any] = {**TEXT, "num_labels": LABELS}
DISTIL: dict[str, Any] = {"dim": HIDDEN, "hidden_dim": 2 * HIDDEN, "n_layers": LAYERS, "n_heads": HEADS}
PIXELS: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 2 * HIDDEN,
    "image_size": 32,
    "patch_size": 8,
}
VISION: dict[str, Any] = {**PIXELS, "num_labels": LABELS}
STAGES: dict[str, Any] = {"hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 2, 1], "num_labels": LABELS}
BOTH: dict[str, Any] = {  # encoder and decoder
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 2 * HIDDEN,
    "decoder_ffn_dim": 2 * HIDDEN,
    "vocab_size": VOCAB,
    "decoder_start_token_id": 2,
    **SPECIAL,
}
LM, CLASSIFIER, SEQ2SEQ = "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModelForSeq2SeqLM"
IMAGE = "AutoModelForImageClassification"

#: Family -> (model class, config class, its arguments, kind).
FAMILIES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "llama": (LM, "LlamaConfig", GQA, "decoder"),
    "qwen2": (LM, "Qwen2Config", GQA, "decoder"),
    "qwen3": (LM, "Qwen3Config", {**GQA, "head_dim": 16}, "decoder"),
    "qwen3-moe": (
        LM,
        "Qwen3MoeConfig",
        {**GQA, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        "decoder",
    ),
    "mixtral": (LM, "MixtralConfig", {**GQA, "num_local_experts": 4}, "decoder"),
    "mistral": (LM, "MistralConfig", {**GQA, "sliding_window": 8}, "decoder"),
    "gemma2": (LM, "Gemma2Config", {**GQA, "head_dim": 16, "sliding_window": 8}, "decoder"),
    "gemma3": (LM, "Gemma3TextConfig", {**GQA, "head_dim": 16, "sliding_window": 8}, "decoder"),
    "phi3": (LM, "Phi3Config", GQA, "decoder"),
    "gpt2": (
        LM,
        "GPT2Config",
        {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, "vocab_size": VOCAB, **SPECIAL},
        "decoder",
    ),
    "gpt-neox": (LM, "GPTNeoXConfig", TEXT, "decoder"),
    "opt": (LM, "OPTConfig", {**TEXT, "ffn_dim": 2 * HIDDEN, "word_embed_proj_dim": HIDDEN}, "decoder"),
    "bloom": (LM, "BloomConfig", {**SHORT, "n_layer": LAYERS, "n_head": HEADS}, "decoder"),
    "falcon": (
        LM,
        "FalconConfig",
        {**SHORT, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "alibi": False},
        "decoder",
    ),
    "mamba": (LM, "MambaConfig", {**SHORT, "num_hidden_layers": LAYERS, "state_size": 8}, "decoder"),
    "bert": (CLASSIFIER, "BertConfig", ENCODER, "encoder"),
    "roberta": (CLASSIFIER, "RobertaConfig", ENCODER, "encoder"),
    "deberta-v2": (
        CLASSIFIER,
        "DebertaV2Config",
        {**ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        "encoder",
    ),
    "albert": (CLASSIFIER, "AlbertConfig", {**ENCODER, "embedding_size": 32}, "encoder"),
    "distilbert": (
        CLASSIFIER,
        "DistilBertConfig",
        {**DISTIL, "vocab_size": VOCAB, "max_position_embeddings": 64, "num_labels": LABELS, "pad_token_id": 2},
        "encoder",
    ),
    "electra": (CLASSIFIER, "ElectraConfig", {**ENCODER, "embedding_size": 32}, "encoder"),
    "t5": (
        SEQ2SEQ,
        "T5Config",
        {
            "d_model": HIDDEN,
            "d_ff": 2 * HIDDEN,
            "d_kv": HIDDEN // HEADS,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "vocab_size": VOCAB,
            "pad_token_id": 2,
            "eos_token_id": 1,
            "decoder_start_token_id": 2,
        },
        "seq2seq",
    ),
    "bart": (SEQ2SEQ, "BartConfig", {**BOTH, "max_position_embeddings": 64}, "seq2seq"),
    "marian": (SEQ2SEQ, "MarianConfig", {**BOTH, "max_position_embeddings": 64}, "seq2seq"),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**BOTH, "num_mel_bins": 16, "max_source_positions": 30, "max_target_positions": 32},
        "speech2seq",
    ),
    "vit": (IMAGE, "ViTConfig", VISION, "vision"),
    "deit": (IMAGE, "DeiTConfig", VISION, "vision"),
    "beit": (IMAGE, "BeitConfig", {**VISION, "use_relative_position_bias": True}, "vision"),
    "swin": (
        IMAGE,
        "SwinConfig",
        {"image_size": 32, "patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
        | {"num_labels": LABELS},
        "vision",
    ),
    "dinov2": (IMAGE, "Dinov2Config", VISION, "vision"),
    "convnext": (IMAGE, "ConvNextConfig", STAGES, "vision"),
    "resnet": (IMAGE, "ResNetConfig", {**STAGES, "embedding_size": 16}, "vision"),
    "mobilenetv2": (IMAGE, "MobileNetV2Config", {"image_size": 64, "num_labels": LABELS}, "vision"),
    "segformer": (
        IMAGE,
        "SegformerConfig",
        {"hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 4, 4]}
        | {"num_labels": LABELS},
        "vision",
    ),
    "detr": (
        "DetrForObjectDetection",
        "DetrConfig",
        {**{k: v for k, v in BOTH.items() if k not in (*SPECIAL, "vocab_size", "decoder_start_token_id")}}
        | {"num_queries": 6, "num_labels": LABELS, "use_timm_backbone": False, "use_pretrained_backbone": False}
        | {"backbone": None, "backbone_config": "resnet"},
        "vision",
    ),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": TEXT, "vision_config": PIXELS, "projection_dim": 32},
        "contrastive",
    ),
    "siglip": ("SiglipModel", "SiglipConfig", {"text_config": TEXT, "vision_config": PIXELS}, "contrastive"),
    "sam": (
        "SamModel",
        "SamConfig",
        {
            "vision_config": {**PIXELS, "image_size": 64, "output_channels": 32, "window_size": 4, "mlp_dim": 128}
            | {"global_attn_indexes": [1], "num_pos_feats": 16},
            "prompt_encoder_config": {"hidden_size": 32, "image_size": 64, "patch_size": 8, "mask_input_channels": 8},
            "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 4}
            | {"iou_head_hidden_dim": 32},
        },
        "segmentation",
    ),
    "upernet": (
        "UperNetForSemanticSegmentation",
        "UperNetConfig",
        {"hidden_size": 32, "num_labels": LABELS, "auxiliary_in_channels": 64, "auxiliary_channels": 32}
        | {"pool_scales": [1, 2], "backbone": None, "use_pretrained_backbone": False, "backbone_config": "convnext"},
        "vision",
    ),
    "wav2vec2": (
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        {
            **TEXT,
            "conv_dim": [32, 32, 32],
            "conv_kernel": [10, 3, 3],
            "conv_stride": [5, 2, 2],
            "num_feat_extract_layers": 3,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
            "mask_time_prob": 0.0,
        },
        "speech",
    ),
}
BACKBONES = {"resnet": "ResNetConfig", "convnext": "ConvNextConfig"}


def hf_case(name: str, family: str, cache: bool = False, **overrides: Any) -> Case:
    """A transformers family from its config."""
    import transformers

    model, config, kwargs, kind = FAMILIES[family]

    def build(seed: int) -> nn.Module:
        given = {**kwargs, **overrides}
        if backbone := given.get("backbone_config"):
            sizes = {k: v for k, v in FAMILIES[backbone][2].items() if k != "num_labels"}
            stages = [f"stage{i}" for i in ((4,) if family == "detr" else (1, 2, 3, 4))]
            given["backbone_config"] = getattr(transformers, BACKBONES[backbone])(**sizes, out_features=stages)
        made = getattr(transformers, config)(**given)
        chosen = getattr(transformers, model)
        return seeded(seed, lambda: chosen.from_config(made) if model.startswith("Auto") else chosen(made))

    return Case(name, build, lambda seed: hf_inputs(family, kind, seed, cache), (LABELS, LABELS + 1, VOCAB), kind)


def hf_inputs(family: str, kind: str, seed: int, cache: bool) -> dict[str, Any]:
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
    size = {"vit": 32, "deit": 32, "beit": 32, "swin": 32, "dinov2": 32}.get(family, 64)
    return {"pixel_values": noise(seed, 1, 3, size, size)}
