"""Hugging Face's `config.json` of a language model or a vision encoder as a section of ours, and back.

Every field that changes what a model computes is read, or refused by name; fields that do not (token ids, dropout,
initialisation) are left alone. Families: `qwen2` (and 2.5), `qwen3`, `llama` (Llama 3, SmolLM2); `siglip`, `siglip2`,
`clip`. A file of a whole two-tower model (`model_type: siglip`) stands for its vision encoder.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from unihetero_jax.config import Activation, DecoderConfig, EncoderConfig, RopeScalingConfig

LanguageFamily = Literal["qwen2", "qwen3", "llama"]
VisionFamily = Literal["siglip", "siglip2", "clip"]

LANGUAGE_CLASSES: Mapping[LanguageFamily, str] = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}
VISION_CLASSES: Mapping[VisionFamily, str] = {
    "siglip": "SiglipVisionModel",
    "siglip2": "Siglip2VisionModel",
    "clip": "CLIPVisionModel",
}
_VISION_TYPES: Mapping[str, VisionFamily] = {
    "siglip": "siglip", "siglip_vision_model": "siglip", "siglip2": "siglip2", "siglip2_vision_model": "siglip2",
    "clip": "clip", "clip_vision_model": "clip",
}  # fmt: skip
_ACTIVATIONS: Mapping[str, Activation] = {
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu", "quick_gelu": "quick_gelu",
}  # fmt: skip
_PIXELS: Mapping[VisionFamily, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "siglip2": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
"""Mean and standard deviation of each family's image processor, where `preprocessor_config.json` does not say."""
_MAX_CONFIG_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """What a language model's `config.json` says: its family, our section, and the rows of its token table."""

    family: LanguageFamily
    decoder: DecoderConfig
    num_rows: int


@dataclasses.dataclass(frozen=True)
class VisionModel:
    """What a vision encoder's `config.json` says."""

    family: VisionFamily
    encoder: EncoderConfig


class _Fields:
    """A JSON object that is read by name; faults are collected, and raised together."""

    def __init__(self, path: Path, values: Mapping[str, Any]):
        self.path, self.values, self.faults = path, values, []

    def number(self, name: str, default: float | None = None) -> Any:
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
            self.faults.append(f"{name}: a positive number was expected, got {value!r}")
            return 1
        return value

    def must_be(self, name: str, *accepted: Any) -> None:
        """Refuses a value of a field that is not supported; an absent one is the first of those accepted."""
        value = self.values.get(name, accepted[0])
        if value not in accepted:
            self.faults.append(f"{name}={value!r} is not supported (only {' or '.join(map(repr, accepted))})")

    def check(self) -> None:
        if self.faults:
            raise ValueError(f"{self.path}: " + "; ".join(self.faults))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size.

    Raises:
        ValueError: the file is missing, too large, or no JSON object.
    """
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; give a folder with config.json and *.safetensors of a pretrained model"
        )
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(f"{path}: larger than {_MAX_CONFIG_BYTES} bytes, no configuration")
    try:
        values = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a JSON object was expected")
    return values


# ---------------------------------------------------------------- language models


def read_language_model(folder: Path, max_grid: int, remat: Any = "none") -> LanguageModel:
    """The decoder section of a language model; `max_grid` and `remat` are ours alone.

    Raises:
        ValueError: the file is missing or damaged, or names a family or a feature that is not supported.
    """
    path = folder / "config.json"
    fields = _Fields(path, read_json(path))
    model_type = fields.values.get("model_type")
    families: dict[str, LanguageFamily] = {name: name for name in LANGUAGE_CLASSES}
    if model_type not in families:
        raise ValueError(f"{path}: model_type {model_type!r} is not supported; there are {', '.join(LANGUAGE_CLASSES)}")
    family = families[model_type]
    fields.must_be("hidden_act", "silu")
    fields.must_be("use_sliding_window", False)
    fields.must_be("mlp_bias", False)
    fields.must_be("attention_bias", False)
    fields.must_be("pretraining_tp", 1)
    fields.must_be("quantization_config", None)
    fields.must_be("rope_interleaved", False)
    if family == "llama" and fields.values.get("layer_types"):
        fields.must_be("layer_types", ["full_attention"] * len(fields.values["layer_types"]))
    num_heads, dim = fields.number("num_attention_heads"), fields.number("hidden_size")
    num_rows = fields.number("vocab_size")
    theta, scaling = _read_rope(fields)
    decoder = DecoderConfig(
        num_layers=fields.number("num_hidden_layers"), dim=dim, num_heads=num_heads,
        num_kv_heads=fields.number("num_key_value_heads", num_heads),
        head_dim=fields.number("head_dim", 128 if family == "qwen3" else dim // num_heads),
        mlp_dim=fields.number("intermediate_size"), vocab_size=num_rows, rope_theta=float(theta),
        norm_eps=fields.number("rms_norm_eps", 1e-6), qk_norm=family == "qwen3", qkv_bias=family == "qwen2",
        tied_embeddings=bool(fields.values.get("tie_word_embeddings", False)), max_grid=max_grid, remat=remat,
        rope_scaling=scaling,
    )  # fmt: skip
    fields.check()
    return LanguageModel(family, decoder, num_rows)


def _read_rope(fields: _Fields) -> tuple[float, RopeScalingConfig]:
    """Base and scaling, of either form: `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
    parameters = fields.values.get("rope_parameters") or fields.values.get("rope_scaling") or {}
    theta = parameters.get("rope_theta") or fields.values.get("rope_theta") or 10000.0
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    rope = _Fields(fields.path, parameters)
    original = rope.values.get("original_max_position_embeddings") or fields.values.get("max_position_embeddings") or 0
    match kind:
        case "default":
            scaling = RopeScalingConfig()
        case "linear":
            scaling = RopeScalingConfig("linear", rope.number("factor"))
        case "llama3":
            low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
            scaling = RopeScalingConfig("llama3", rope.number("factor"), original, low, high)
        case "yarn":
            scaling = _read_yarn(rope, original)
        case _:
            rope.faults.append(f"rope_type={kind!r} is not supported (default, linear, llama3, yarn)")
            scaling = RopeScalingConfig()
    fields.faults += rope.faults
    return theta, scaling


def _read_yarn(rope: _Fields, original: int) -> RopeScalingConfig:
    factor = rope.number("factor")
    mscale, mscale_all = (rope.values.get(name) for name in ("mscale", "mscale_all_dim"))

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = rope.values.get("attention_factor")
    if attention is None:
        attention = magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude(1.0)
    return RopeScalingConfig(
        "yarn", factor, original, rope.number("beta_slow", 1.0), rope.number("beta_fast", 32.0), attention,
        bool(rope.values.get("truncate", True)),
    )  # fmt: skip


def language_family(decoder: DecoderConfig) -> LanguageFamily:
    """The family whose class computes what a decoder does.

    Raises:
        ValueError: none has both norms of queries and keys and biases.
    """
    if decoder.qk_norm and decoder.qkv_bias:
        raise ValueError("model.decoder has qk_norm and qkv_bias: no family of Hugging Face has both")
    return "qwen3" if decoder.qk_norm else "qwen2" if decoder.qkv_bias else "llama"


def language_config(decoder: DecoderConfig, max_positions: int, dtype: str) -> dict[str, Any]:
    """`config.json` of a decoder for transformers, which `read_language_model` reads as the same decoder."""
    family = language_family(decoder)
    return {
        "architectures": [LANGUAGE_CLASSES[family]], "model_type": family, "hidden_act": "silu",
        "hidden_size": decoder.dim, "intermediate_size": decoder.mlp_dim, "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_heads, "num_key_value_heads": decoder.num_kv_heads,
        "head_dim": decoder.head_dim, "vocab_size": decoder.vocab_size, "rms_norm_eps": decoder.norm_eps,
        "tie_word_embeddings": decoder.tied_embeddings, "max_position_embeddings": max_positions,
        "rope_parameters": _rope_parameters(decoder), "dtype": dtype,
        **({"attention_bias": False} if family != "qwen2" else {}),
    }  # fmt: skip


def _rope_parameters(decoder: DecoderConfig) -> dict[str, Any]:
    scaling = decoder.rope_scaling
    parameters: dict[str, Any] = {"rope_theta": decoder.rope_theta, "rope_type": scaling.kind}
    match scaling.kind:
        case "none":
            parameters["rope_type"] = "default"
        case "linear":
            parameters |= {"factor": scaling.factor}
        case "llama3":
            parameters |= {"factor": scaling.factor, "low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
        case "yarn":
            parameters |= {
                "factor": scaling.factor, "beta_slow": scaling.low, "beta_fast": scaling.high,
                "attention_factor": scaling.attention_factor, "truncate": scaling.truncate,
            }  # fmt: skip
    if scaling.original_positions:
        parameters["original_max_position_embeddings"] = scaling.original_positions
    return parameters


# ---------------------------------------------------------------- vision encoders


def read_vision_encoder(folder: Path, remat: Any = "none") -> VisionModel:
    """The encoder section of a vision encoder.

    Raises:
        ValueError: the file is missing or damaged, or names a family or a feature that is not supported.
    """
    path = folder / "config.json"
    values = read_json(path)
    model_type = str(values.get("model_type"))
    if model_type not in _VISION_TYPES:
        raise ValueError(f"{path}: model_type {model_type!r} is not supported; there are {', '.join(_VISION_TYPES)}")
    family = _VISION_TYPES[model_type]
    fields = _Fields(path, values.get("vision_config", values))
    fields.must_be("num_channels", 3)
    fields.must_be("quantization_config", None)
    activation = fields.values.get("hidden_act", "quick_gelu" if family == "clip" else "gelu_pytorch_tanh")
    if activation not in _ACTIVATIONS:
        fields.faults.append(f"hidden_act={activation!r} is not supported (only {', '.join(_ACTIVATIONS)})")
    patch_size = fields.number("patch_size", 32 if family == "clip" else 16)
    if family == "siglip2":
        side = math.isqrt(fields.number("num_patches", 256))
        if side * side != fields.number("num_patches", 256):
            fields.faults.append(f"num_patches={fields.values['num_patches']} is no square")
    else:
        side = fields.number("image_size", 224) // patch_size
    mean, std = _read_pixels(folder, family)
    encoder = EncoderConfig(
        num_layers=fields.number("num_hidden_layers", 12), dim=fields.number("hidden_size", 768),
        num_heads=fields.number("num_attention_heads", 12), mlp_dim=fields.number("intermediate_size", 3072),
        patch_size=patch_size, position_grid=side, attention="bidirectional", remat=remat,
        activation=_ACTIVATIONS.get(activation, "gelu"),
        norm_eps=fields.number("layer_norm_eps", 1e-5 if family == "clip" else 1e-6), pixel_mean=mean, pixel_std=std,
        class_token=family == "clip", patch_bias=family != "clip", pre_norm=family == "clip",
    )  # fmt: skip
    fields.check()
    return VisionModel(family, encoder)


def _read_pixels(folder: Path, family: VisionFamily) -> tuple[tuple[float, ...], tuple[float, ...]]:
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return _PIXELS[family]
    values = read_json(path)
    mean, std = (
        values.get(name, default) for name, default in zip(("image_mean", "image_std"), _PIXELS[family], strict=True)
    )
    if not (len(mean) == len(std) == 3):
        raise ValueError(f"{path}: image_mean and image_std need three values each, got {mean} and {std}")
    return tuple(map(float, mean)), tuple(map(float, std))


def vision_family(encoder: EncoderConfig) -> VisionFamily:
    """The family whose class computes what an encoder does.

    Raises:
        ValueError: there is none; names the fields.
    """
    is_clip = (encoder.class_token, encoder.pre_norm, not encoder.patch_bias)
    if encoder.attention == "causal":
        raise ValueError("model.encoder.attention=causal: no vision encoder of Hugging Face has it")
    if len(set(is_clip)) > 1:
        raise ValueError(
            "model.encoder: class_token, pre_norm and no patch_bias go together (CLIP), or none of them (SigLIP)"
        )
    return "clip" if encoder.class_token else "siglip2"


def vision_config(encoder: EncoderConfig, family: VisionFamily, dtype: str) -> dict[str, Any]:
    """`config.json` of an encoder for transformers, which `read_vision_encoder` reads as the same encoder."""
    activations = {ours: theirs for theirs, ours in reversed(list(_ACTIVATIONS.items()))}
    size = (
        {"num_patches": encoder.position_grid**2}
        if family == "siglip2"
        else {"image_size": encoder.position_grid * encoder.patch_size}
    )
    head = {} if family == "clip" else {"vision_use_head": False}
    return {
        "architectures": [VISION_CLASSES[family]],
        "model_type": {"siglip": "siglip_vision_model", "siglip2": "siglip2_vision_model", "clip": "clip_vision_model"}[
            family
        ],
        "hidden_act": activations[encoder.activation], "hidden_size": encoder.dim,
        "intermediate_size": encoder.mlp_dim, "num_hidden_layers": encoder.num_layers,
        "num_attention_heads": encoder.num_heads, "patch_size": encoder.patch_size, "num_channels": 3,
        "layer_norm_eps": encoder.norm_eps, "dtype": dtype, **size, **head,
    }  # fmt: skip
