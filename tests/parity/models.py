"""Tiny random models of every supported family, made by transformers, and what torch computes with them.

Used twice: live (`make parity`), and to write the golden arrays of the default suite, which needs no torch
(`make parity-golden`).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

GOLDEN = Path(__file__).parent / "golden"
VOCABULARY, LENGTH, NUM_NEW = 96, 40, 64
GRIDS = ((6, 6), (2, 12), (10, 4), (4, 4), (12, 8))
"""Images of a NaFlex encoder in patches: square, wide, tall, smaller and larger than its position table of 6 x 6."""
PATCH = 4

_LANGUAGE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}
_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500000.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
_LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
_VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": PATCH,
}  # fmt: skip


def _llama(**changes: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LANGUAGE | changes))


def _qwen2(**changes: Any) -> Any:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_LANGUAGE | changes))


def _qwen3(**changes: Any) -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_LANGUAGE | changes))


LANGUAGE_MODELS: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: _qwen2(tie_word_embeddings=True),
    "qwen2_yarn": lambda: _qwen2(tie_word_embeddings=False, rope_parameters=_YARN),
    "qwen3": lambda: _qwen3(head_dim=16, tie_word_embeddings=False),
    "llama3": lambda: _llama(tie_word_embeddings=False, rope_parameters=_LLAMA3),
    "llama_linear": lambda: _llama(tie_word_embeddings=False, rope_parameters=_LINEAR),
    "smollm2": lambda: _llama(tie_word_embeddings=True),
}
VISION_ENCODERS: dict[str, Callable[[], Any]] = {
    "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(image_size=24, **_VISION)),
    "siglip2": lambda: transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(num_patches=36, **_VISION)),
    "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(image_size=24, **_VISION)),
}


def make(name: str, seed: int, folder: Path) -> Any:
    """Builds a model, moves every parameter away from its initial value (biases are 0, gains 1), and saves it."""
    torch.manual_seed(seed)
    model = (LANGUAGE_MODELS | VISION_ENCODERS)[name]()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model = model.float().eval()
    model.save_pretrained(folder)
    return model


def make_from(folder: Path) -> Any:
    """The language model of a golden folder."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()


def language_outputs(model: Any, seed: int) -> dict[str, np.ndarray]:
    """Logits, hidden states after every layer, a greedy continuation, and the gradients of one step."""
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, (2, LENGTH))
    tokens = torch.tensor(ids)
    output = model(tokens, output_hidden_states=True, labels=tokens)
    output.loss.backward()
    found = {"ids": ids, "logits": output.logits, "loss": output.loss}
    found |= {f"hidden/{number}": hidden for number, hidden in enumerate(output.hidden_states)}
    found |= {f"gradient/{name}": parameter.grad for name, parameter in model.named_parameters()}
    with torch.no_grad():
        grown = model.generate(
            tokens[:1, :8], max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW, do_sample=False, pad_token_id=0
        )
    return _arrays(found | {"greedy": grown[0, 8:]})


def vision_outputs(model: Any, name: str, seed: int) -> dict[str, np.ndarray]:
    """Pixels of images, features of their patches after every layer and at the end, and gradients of one step."""
    rng = np.random.default_rng(seed)
    grids = GRIDS if name == "siglip2" else ((6, 6), (6, 6))
    found: dict[str, Any] = {"grids": np.array(grids)}
    total = torch.tensor(0.0)
    for number, (height, width) in enumerate(grids):
        pixels = rng.integers(0, 256, (height * PATCH, width * PATCH, 3)).astype(np.uint8)
        weights = rng.standard_normal((height * width, 32)).astype(np.float32)
        states = _vision_states(model, name, pixels, (height, width))
        for layer, state in enumerate(states):
            found[f"hidden/{number}/{layer}"] = state
        found |= {f"pixels/{number}": pixels, f"weights/{number}": weights}
        total = total + (states[-1] * torch.tensor(weights)).sum()
    total.backward()
    grads = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
    return _arrays(found | {f"gradient/{key}": grad for key, grad in grads.items()})


def _vision_states(model: Any, name: str, pixels: np.ndarray, grid: tuple[int, int]) -> list[Any]:
    """Of one image, [patches in raster order, width]: after every layer, then after the last norm."""
    mean, std = (np.array(x, np.float32) for x in _PIXELS[name == "clip"])
    scaled = ((pixels.astype(np.float32) / 255 - mean) / std).astype(np.float32)
    height, width = grid
    if name == "siglip2":
        patches = scaled.reshape(height, PATCH, width, PATCH, 3).transpose(0, 2, 1, 3, 4).reshape(1, height * width, -1)
        mask, shape = torch.ones(1, height * width, dtype=torch.int32), torch.tensor([grid])
        output = model(torch.tensor(patches), mask, shape, output_hidden_states=True)
    else:
        output = model(torch.tensor(scaled.transpose(2, 0, 1)[None]), output_hidden_states=True)
    states = [*output.hidden_states[1:], output.last_hidden_state]
    if name == "clip":  # its class puts the last norm on the class token alone
        states = [state[:, 1:] for state in [*states[:-1], model.post_layernorm(states[-1])]]
    return [state[0] for state in states]


_PIXELS = {
    False: ((0.5,) * 3, (0.5,) * 3),
    True: ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


def _arrays(found: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: x.detach().numpy() if isinstance(x, torch.Tensor) else np.asarray(x) for name, x in found.items()}


def main() -> None:
    """Writes the golden folders: config.json and weights as transformers saves them, and what torch computed."""
    for name in (*LANGUAGE_MODELS, *VISION_ENCODERS):
        folder = GOLDEN / name
        model = make(name, 0, folder)
        outputs = language_outputs(model, 0) if name in LANGUAGE_MODELS else vision_outputs(model, name, 0)
        np.savez_compressed(folder / "expected.npz", **outputs)
        (folder / "versions.json").write_text(
            json.dumps({"torch": torch.__version__, "transformers": transformers.__version__}) + "\n"
        )
        print(folder)


if __name__ == "__main__":
    main()
