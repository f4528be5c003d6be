"""Does the result hold at the sizes that are trained today: 0.1 to 8 billion parameters, on pods and on GPU servers?

Command: `python -m unihetero_jax compile --config=experiments/pretrain.py:8b@v5e:16x16 --topology=v5e:16x16` says
whether it fits and how fast it can be; then, for each of the objectives `semantic_input` and `understanding`,
`python -m unihetero_jax train --config=experiments/pretrain.py:8b@v5e:16x16 --config.objective=OBJECTIVE
--workdir=gs://...`. Not run: no such machine was at hand. What the compiler says of every size and machine stands in
`benchmarks/results/compile_ahead.json` (`make compile-ahead`).

The argument is `SIZE[/SCALE][@MACHINE]`: `8b`, `8b@v6e-256`, `1b/1000@8xH100`. Sizes: debug, 100m, 1b, 3b, 8b; SCALE
takes the mixture's twin of a tenth (10) or a thousandth (1000); machines are written as for `--topology`. By default
that is a v5e pod, for `debug` a v5e:2x4.

Encoder: the shape of SigLIP 2 so400m at patch 16 (arXiv 2502.14786), native resolution; decoders: those of Qwen3 1.7B
(1b), Qwen2.5 3B (3b) and Qwen3 8B (8b), so that their weights fit; all start at random. `100m` and `debug` are ours.
Rows of 8,192 positions hold about two million tokens a step. The mixture is that of `experiments/mixtures/public_200m`.
"""

import dataclasses
import math
from typing import Any

from ml_collections import ConfigDict

from experiments import base
from experiments.mixtures import public_200m
from unihetero_jax.topology import CHIPS, parse_topology

VOCAB_SIZE = 151_936
"""Of Qwen's tokenizer, padded by its authors to 1,187 x 128."""
SPARE_PATCHES = 1.03
"""Patches of a row over the mean of the mixture: `data-stats` finds that rows then fill their tokens."""

SO400M = {"num_layers": 27, "dim": 1152, "num_heads": 16, "mlp_dim": 4304}
SMALL = {"num_layers": 12, "dim": 384, "num_heads": 6, "mlp_dim": 1536}


@dataclasses.dataclass(frozen=True)
class Size:
    """Shapes of a model and how it is trained; `max_fsdp` bounds the devices that a parameter is split over.

    More than that is `data`: a small parameter in many pieces costs more time than memory. For so400m 128 is the most:
    its width is 9 x 128.
    """

    encoder: dict[str, Any]
    decoder: dict[str, Any]
    learning_rate: float
    max_fsdp: int = 128
    machine: str = "v5e:16x16"
    row_tokens: int = 8192
    batch_rows: int = 256


def _qwen(layers: int, dim: int, heads: int, kv_heads: int, head_dim: int, mlp_dim: int, **changes: Any) -> dict:
    return {
        "num_layers": layers, "dim": dim, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim,
        "mlp_dim": mlp_dim, "vocab_size": VOCAB_SIZE, "rope_theta": 1e6, "qk_norm": True, "qkv_bias": False,
        "tied_embeddings": True,
    } | changes  # fmt: skip


SIZES = {
    "debug": Size(
        {"num_layers": 6, "dim": 64, "num_heads": 2, "mlp_dim": 128}, _qwen(6, 128, 4, 2, 32, 256, vocab_size=4096),
        1e-3, 8, "v5e:2x4", row_tokens=512, batch_rows=16,
    ),
    "100m": Size(SMALL, _qwen(8, 512, 8, 2, 64, 1536), 1e-3, 8),
    "1b": Size(SO400M, _qwen(28, 2048, 16, 8, 128, 6144), 5e-4),
    "3b": Size(SO400M, _qwen(36, 2048, 16, 2, 128, 11_008, qk_norm=False, qkv_bias=True), 4e-4),
    "8b": Size(SO400M, _qwen(36, 4096, 32, 8, 128, 12_288, tied_embeddings=False), 3e-4),
}  # fmt: skip
TARGETS = ("v5e:16x16", "v6e:16x16", "v5p:4x4x4", "8xH100", "8xH200")
"""The machines that the sizes are compiled, or partitioned, for."""
FSDP_ON_TORUS = {"v5p": 16}
"""Of a three-dimensional torus: two of its dimensions. Over all three libtpu writes every all-gather as an all-reduce,
which sends twice the bytes."""
ROWS_AT_ONCE = {"v5p": 4, "H200": 2}
"""Rows of a microbatch on one device, where its memory has room for more than one (our choice, by the compiler)."""


def get_config(arg: str = "") -> ConfigDict:
    """A size on a machine; `arg` as above, `8b` if empty."""
    text, _, machine = (arg or "8b").partition("@")
    name, _, scale = text.partition("/")
    if name not in SIZES:
        raise ValueError(f"experiments/pretrain.py:{arg}: no size {name!r}; there are {', '.join(SIZES)}")
    size = SIZES[name]
    config = base.get_config()
    config.model.encoder.update(**size.encoder, patch_size=16, position_grid=16, remat="full")
    config.model.decoder.update(**size.decoder, max_grid=256, remat="full")
    config.model.projector.hidden_dim = 4 * size.encoder["dim"]
    config.model.semantic_head.hidden_dim = 2 * size.decoder["dim"]
    config.model.compute_dtype = "bfloat16"
    config.data.turns = "repeated_prefix"  # the TPU's kernel knows segments alone; the same rows on every machine
    with_mixture(config, scale or "1", size.row_tokens, size.batch_rows)
    config.optimizer.update(learning_rate=size.learning_rate, warmup_steps=2000, beta2=0.95)
    # The costlier of the targets: what compiles and fits with the average does so with the cut.
    config.loss.update(target="ema", cut_input_gradient=False, ema_decay=0.999)
    config.loss.update(visual_ramp_steps=4000, text_chunk=512)
    on_machine(config, size, machine or size.machine)
    return config


def with_mixture(config: ConfigDict, scale: str, row_tokens: int, batch_rows: int) -> None:
    """The public mixture at a scale, in rows of this length; one pass, as planned from the recipe's estimates.

    Set `train.num_steps` and `data.row_patches` by `data-stats` once the folders are there.
    """
    config.data.sources = ConfigDict(public_200m.sources(scale))
    config.data.tokenizer = public_200m.TOKENIZER
    config.data.image_min_patches, config.data.image_max_patches = 64, 1024
    cost = public_200m.total([public_200m.cost_of(source, scale) for source in public_200m.SOURCES])
    config.data.row_tokens = row_tokens
    patches = math.ceil(row_tokens * 4 * cost.visual / cost.positions * SPARE_PATCHES / 64) * 64
    config.data.row_patches = max(patches, config.data.image_max_patches)
    config.data.num_data_shards, config.data.window_size = min(64, batch_rows), 6144
    config.data.num_threads, config.data.prefetch_batches = 32, 4
    config.train.num_steps = public_200m.num_steps(cost.positions, row_tokens, batch_rows)
    config.train.global_batch_rows = batch_rows
    config.train.log_every_steps, config.train.eval_every_steps = 100, 5000
    config.checkpoint.update(every_steps=1000, keep_every_steps=20_000)
    config.eval.batch_rows = config.eval.validation_rows = batch_rows


def on_machine(config: ConfigDict, size: Size, machine: str) -> None:
    """Mesh and microbatches: parameters split as far as their widths allow, then `data`; rows as memory allows."""
    topology = parse_topology(machine)
    devices, rows = topology.num_devices, size.batch_rows
    if not devices:
        raise ValueError(f"{machine}: name the GPUs, such as 8xH100")
    common = math.gcd(size.encoder["dim"], size.decoder["dim"])
    chip = topology.chip.name if topology.chip in CHIPS.values() else ""
    most = min(devices, size.max_fsdp, FSDP_ON_TORUS.get(chip, devices))
    fsdp = max(n for n in range(1, most + 1) if devices % n == 0 and common % n == 0)
    config.mesh.update(data=devices // fsdp, fsdp=fsdp)
    if rows % devices:
        raise ValueError(f"{machine}: {rows} rows a step cannot be dealt to {devices} devices; take a larger size")
    at_once = ROWS_AT_ONCE.get(chip, 1)
    config.train.accumulation_steps = max(1, rows // devices // at_once)
