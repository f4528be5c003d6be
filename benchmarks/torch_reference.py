"""The other side of benchmarks/train_step.py: the same model in PyTorch, from the classes of `transformers`.

`LlavaForConditionalGeneration` over a `SiglipVisionModel` and a Llama decoder, random weights, with our 2x2 merge and
projector in the place of Llava's (which has no merge), so that shapes and parameter count agree part by part: patches,
position table, pre-norm blocks with biases, merge, two-layer projector with output norm, rotary grouped-query decoder
with gated MLP and tied embeddings. Only our grid embeddings at `<boi>` have no counterpart (below 0.05% of the
parameters).

It gets what helps it: scaled-dot-product attention, the causal fast path (no mask tensor), fused AdamW. Compute is
float32, or bfloat16 under autocast.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from unihetero_jax.config import ModelConfig

IGNORED = -100


class MergeProjector(nn.Module):
    """Final encoder norm, 2x2 merge, two-layer MLP, output norm: `merge_patches` and `Projector` of the package."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        dim = model.encoder.dim
        self.encoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.linear_1 = nn.Linear(4 * dim, model.projector.hidden_dim)
        self.linear_2 = nn.Linear(model.projector.hidden_dim, model.decoder.dim)
        self.norm = LlamaRMSNorm(model.decoder.dim, eps=model.decoder.norm_eps)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[images, patches in raster order, E] to [images, patches / 4, D]."""
        images, patches, dim = features.shape
        side = int(patches**0.5)
        blocks = self.encoder_norm(features).view(images, side // 2, 2, side // 2, 2, dim)
        merged = blocks.transpose(2, 3).reshape(images, patches // 4, 4 * dim)
        hidden = nn.functional.gelu(self.linear_1(merged), approximate="tanh")
        return self.norm(self.linear_2(hidden))


def build_model(model: ModelConfig, image_side: int) -> nn.Module:
    """The model with random weights. `image_side` in pixels; the last token id stands for visual positions."""
    encoder, decoder = model.encoder, model.decoder
    vision = SiglipVisionConfig(
        hidden_size=encoder.dim, intermediate_size=encoder.mlp_dim, num_hidden_layers=encoder.num_layers,
        num_attention_heads=encoder.num_heads, image_size=image_side, patch_size=encoder.patch_size,
        hidden_act="gelu_pytorch_tanh", vision_use_head=False,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=decoder.vocab_size, hidden_size=decoder.dim, intermediate_size=decoder.mlp_dim,
        num_hidden_layers=decoder.num_layers, num_attention_heads=decoder.num_heads,
        num_key_value_heads=decoder.num_kv_heads, head_dim=decoder.head_dim, rms_norm_eps=decoder.norm_eps,
        tie_word_embeddings=decoder.tied_embeddings, max_position_embeddings=4096, use_cache=False,
    )  # fmt: skip
    fields: dict[str, Any] = {
        "vision_config": vision, "text_config": text, "image_token_id": decoder.vocab_size - 1,
        "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
        "tie_word_embeddings": decoder.tied_embeddings, "attn_implementation": "sdpa",
    }  # fmt: skip
    llava: Any = LlavaForConditionalGeneration(LlavaConfig(**fields))
    # Llava takes the features before the tower's final norm; the projector above applies that norm, once.
    llava.model.vision_tower.post_layernorm = nn.Identity()
    llava.model.multi_modal_projector = MergeProjector(model)
    return llava


def make_run(
    model: ModelConfig, tokens: Any, supervised: Any, images: Any, compiled: bool, dtype: str
) -> tuple[Callable[[int], float], dict[str, Any]]:
    """A function that takes `n` training steps and returns their seconds, and facts about the model.

    Args:
        model: the architecture.
        tokens: int[T], with the last token id at visual positions.
        supervised: bool[T].
        images: uint8[n, side, side, 3].
        compiled: through `torch.compile`.
        dtype: `float32`, or `bfloat16` for autocast.
    """
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    network = build_model(model, images.shape[1])
    network.train()
    pixel_values = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    input_ids = torch.from_numpy(tokens).long()[None]
    labels = torch.where(torch.from_numpy(supervised)[None], input_ids, IGNORED)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    # Llava reads scalars in its forward pass; captured, they do not break the graph.
    torch._dynamo.config.capture_scalar_outputs = True
    forward: Any = torch.compile(network) if compiled else network

    def step() -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = forward(input_ids=input_ids, pixel_values=pixel_values, labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def run(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        return time.perf_counter() - start

    first_loss = step()
    without_gradient = [name for name, value in network.named_parameters() if not optimizer.state[value]]
    assert not without_gradient, f"not trained: {without_gradient}"
    facts = {
        "parameters": sum(value.numel() for value in network.parameters()),
        "first_loss": first_loss,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
    return run, facts
