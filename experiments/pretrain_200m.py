"""Does predicting the next visual embedding help a half-billion model understand, on 200M heterogeneous samples?

Command: prepare the folders (`python -m experiments.mixtures.public_200m --commands`), then on a slice, for each of the
objectives `semantic_input` and `understanding`:
`python -m unihetero_jax train --config=experiments/pretrain_200m.py --config.objective=OBJECTIVE --workdir=gs://...`.
`pretrain_200m.py:10` and `:1000` take the twins of a tenth and a thousandth, one pass each.
Expected: the paper (arXiv 2512.23512, more than 200M samples) finds that it helps, arXiv 2608.12209 that it hurts. Ours
has not been run: this is the recipe as a configuration, sized for 64 chips.

The encoder has the shape of SigLIP 2 base, the decoder that of Qwen2.5 0.5B, so that their weights fit; both start at
random. A pass is planned from the recipe's estimates: set `train.num_steps`, `data.row_patches` by `data-stats` once
the folders are there.
"""

from ml_collections import ConfigDict

from experiments import base
from experiments.pretrain import with_mixture

ROW_TOKENS, BATCH_ROWS = 4096, 256


def get_config(arg: str = "") -> ConfigDict:
    """The run on the mixture; `arg` is its scale: 1 (also when empty), 10 or 1000."""
    scale = arg or "1"
    config = base.get_config()
    config.model.encoder.update(
        num_layers=12, dim=768, num_heads=12, mlp_dim=3072, patch_size=16, position_grid=16, remat="full"
    )
    config.model.projector.hidden_dim = 3072
    config.model.decoder.update(
        num_layers=24, dim=896, num_heads=14, num_kv_heads=2, head_dim=64, mlp_dim=4864, vocab_size=65_536,
        rope_theta=1e6, qk_norm=False, qkv_bias=True, max_grid=256, remat="full",
    )  # fmt: skip
    config.model.semantic_head.hidden_dim = 1792
    config.model.compute_dtype = "bfloat16"
    with_mixture(config, scale, ROW_TOKENS, BATCH_ROWS)
    config.optimizer.update(learning_rate=5e-4, warmup_steps=2000, beta2=0.95)
    config.loss.visual_ramp_steps = 4000  # as arXiv 2608.12209
    config.loss.update(target="ema", cut_input_gradient=False, ema_decay=0.999)
    config.loss.text_chunk = 4096
    config.mesh.update(data=8, fsdp=8)
    return config
