"""Folders of tiny models as transformers saved them, each with what torch computed (`expected.npz`)."""

from pathlib import Path

FOLDER = Path(__file__).parent
LANGUAGE_MODELS = ("qwen2", "qwen2_yarn", "qwen3", "llama3", "llama_linear", "smollm2")
VISION_ENCODERS = ("siglip", "siglip2", "clip")
