"""What every test runs under: eight simulated CPU devices, float32 matrix products, a compile cache that is kept.

The variables are set before anything imports jax, and subprocesses of the tests inherit them. A test that wants one
device takes the first; `pytest -n 2` gives each worker its own eight.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "float32"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ["HF_HUB_OFFLINE"] = "1"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import pytest  # noqa: E402

from experiments import base  # noqa: E402
from unihetero_jax.config import Config, from_config_dict  # noqa: E402

TINY = {
    "model.encoder.num_layers": 2, "model.encoder.dim": 16, "model.encoder.num_heads": 2, "model.encoder.mlp_dim": 32,
    "model.encoder.patch_size": 4, "model.encoder.position_grid": 4,
    "model.projector.hidden_dim": 32,
    "model.decoder.num_layers": 2, "model.decoder.dim": 32, "model.decoder.num_heads": 4,
    "model.decoder.num_kv_heads": 2, "model.decoder.head_dim": 8, "model.decoder.mlp_dim": 64,
    "model.decoder.vocab_size": 64, "model.decoder.max_grid": 8,
    "model.semantic_head.hidden_dim": 32,
    "data.sources": {"only": {"path": "nowhere", "weight": 1.0, "augment": "none"}},
    "data.row_tokens": 32, "data.row_patches": 32, "data.image_min_patches": 4, "data.image_max_patches": 16,
    "data.num_data_shards": 2, "data.window_size": 16,
    "train.num_steps": 10, "train.global_batch_rows": 4,
    "eval.batch_rows": 4,
}  # fmt: skip


def make_tiny_config(**changes: object) -> Config:
    """The base experiment with a model that compiles in a second; `changes` use `__` for dots: `train__num_steps=3`."""
    config_dict = base.get_config()
    for path, value in (TINY | {name.replace("__", "."): value for name, value in changes.items()}).items():
        section, _, name = path.rpartition(".")
        target = config_dict
        for part in section.split(".") if section else ():
            target = target[part]
        with target.ignore_type():
            target[name] = value
    return from_config_dict(config_dict)


@pytest.fixture
def tiny_config():
    """The function that builds a tiny configuration: `tiny_config(train__num_steps=3)`."""
    return make_tiny_config


@pytest.fixture
def repo_root() -> Path:
    return ROOT
