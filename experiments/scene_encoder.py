"""The encoder that every arm of a claim starts from: it learns which caption belongs to which scene.

    python -m experiments.scene_encoder --workdir=runs/scene_encoder
    python -m experiments.scene_encoder --variant=easy-fine --workdir=runs/scene_encoder-fine

Contrastive, by the pairwise sigmoid loss of SigLIP (arXiv 2303.15343): an image is the mean of its merged features, a
caption the hidden state at `<boi>`, which has read the caption and nothing of the image. Scenes of a seed that no other
experiment uses, no questions. The encoder is kept, as a run that `init_from.workdir` takes, named by a digest; the
text's side is thrown away. Expected: of 64 unseen scenes it finds that of a caption in more than half of the cases
(chance .016); the command prints the share and the digest. `-fine` has smaller patches, so that an image has 64 visual
tokens, and `-causal` an encoder whose blocks see no later ones.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from data_pipelines.scenes import IMAGE_SIZE
from experiments import quickstart
from unihetero_jax.arrays import Batch, ModelOutput
from unihetero_jax.checkpoint import Checkpointer, list_steps
from unihetero_jax.config import MERGED_PATCHES, Config, to_dict
from unihetero_jax.config_reading import differences, from_config_dict
from unihetero_jax.data.mixture import make_train_iterator, validation_batches
from unihetero_jax.data.tokenizer import load_tokenizer
from unihetero_jax.evaluation.rollout_error import digest_of
from unihetero_jax.loaded_run import load_run
from unihetero_jax.metrics import announce
from unihetero_jax.model.unihetero import build, init_params
from unihetero_jax.optim import is_decayed, learning_rate_schedule
from unihetero_jax.train_run import exit_code, make_scene_world
from unihetero_jax.workdir import RunLock, prepare_workdir, write_config

SEED = 6_151
"""Of its scenes and of its parameters."""
VARIANTS = ("easy", "hard", "easy-fine", "easy-fine-causal", "hard-fine", "hard-fine-causal")
IMAGES_PER_ROW = 4
NUM_CANDIDATES = 64
_WIDTH = 128
_START_SCALE, _START_BIAS = float(np.log(10.0)), -10.0
"""As SigLIP starts: nearly all pairs of a batch are wrong ones, and the bias says so from the first step."""


def small_model(config: ConfigDict) -> None:
    """Two layers each: a step takes a fraction of the quickstart's, and a sweep has many runs."""
    config.model.encoder.update(num_layers=2, dim=64, num_heads=2, mlp_dim=128)
    config.model.projector.hidden_dim = config.model.semantic_head.hidden_dim = 128
    config.model.decoder.update(num_layers=2, dim=96, num_heads=3, num_kv_heads=1, head_dim=32, mlp_dim=192)
    config.model.pixel_decoder.update(num_layers=2, dim=64, num_heads=2, mlp_dim=256)


def fine_images(config: ConfigDict, images_per_row: int) -> None:
    """Scenes in 16 x 16 patches, 8 x 8 visual tokens: rollouts long enough for errors to add up."""
    config.model.encoder.update(patch_size=IMAGE_SIZE[config.scene_world.level] // 16, position_grid=16)
    config.data.image_min_patches = config.data.image_max_patches = 256
    config.data.row_tokens, config.data.row_patches = 112 * images_per_row, 256 * images_per_row


def get_config(arg: str = "") -> ConfigDict:
    """The encoder of a variant, `easy` if empty, with the small model of the sweeps."""
    variant = arg or "easy"
    if variant not in VARIANTS:
        raise ValueError(f"experiments/scene_encoder.py: {variant!r}; there are {', '.join(VARIANTS)}")
    level, *others = variant.split("-")
    world = "-".join([level, *(["fine"] if "fine" in others else [])])
    path = f"data/encoder-{world}"
    config = quickstart.get_config()
    small_model(config)
    config.objective, config.seed = "understanding", SEED
    config.scene_world.update(level=level, path=path, seed=SEED)
    config.data.tokenizer = f"{path}/tokenizer"
    config.data.sources = ConfigDict({"captions": {"path": f"{path}/generation", "weight": 1.0, "augment": "none"}})
    config.data.row_tokens, config.data.row_patches = 56 * IMAGES_PER_ROW, 36 * IMAGES_PER_ROW
    if "fine" in others:
        fine_images(config, IMAGES_PER_ROW)
    if "causal" in others:
        config.model.encoder.attention = "causal"
    config.eval.benchmarks, config.eval.rollout_source = ConfigDict(), ""
    config.train.num_steps = 2000
    return config


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains and stores the encoder, unless it is there; prints its digest."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.scene_encoder", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--workdir", default="runs/scene_encoder")
    parser.add_argument("--variant", default="easy", choices=VARIANTS)
    flags = parser.parse_args(arguments)
    return exit_code(lambda: train_encoder(from_config_dict(get_config(flags.variant)), flags.workdir))


def train_encoder(config: Config, workdir: str) -> None:
    """Learns from pairs for `train.num_steps` steps and stores the last one; an interrupted training starts again.

    Raises:
        ValueError: the folder holds an encoder of another configuration.
        WorkdirError: another process trains it.
    """
    folder = prepare_workdir(workdir)
    if config.train.num_steps in list_steps(folder):
        run = load_run(workdir, config.train.num_steps, 0)
        if differing := differences(to_dict(run.config), to_dict(config)):
            raise ValueError(f"--workdir={workdir} holds another encoder ({'; '.join(differing)}); name another folder")
        announce(f"{workdir}: encoder {digest_of(run.params['encoder'])} is there")
        return
    with RunLock(folder):
        make_scene_world(config)
        tokenizer = load_tokenizer(config.data.tokenizer)
        towers, optimizer = init_towers(config), _optimizer(config)
        step = jax.jit(functools.partial(_train_step, config, optimizer, tokenizer.boi_id))
        state = optimizer.init(towers)
        stream = make_train_iterator(config, tokenizer)
        for number in range(1, config.train.num_steps + 1):
            towers, state, loss = step(towers, state, Batch(**jax.tree.map(jnp.asarray, next(stream).arrays)))
            if number % 100 == 0:
                announce(f"step {number}/{config.train.num_steps}  sigmoid loss {float(loss):.4f}")
        stream.close()
        write_config(folder, to_dict(config))
        checkpointer = Checkpointer(folder, config, {"tokenizer": tokenizer.hash}, announce)
        checkpointer.save(config.train.num_steps, {"params": towers["model"]}, {}, wait=True)
        checkpointer.close()
    found = retrieval(config, towers, tokenizer)
    announce(f"finds the scene of an unseen caption among {NUM_CANDIDATES} in {found:.3f} (chance "
             f"{1 / NUM_CANDIDATES:.3f}); encoder {digest_of(towers['model']['encoder'])}")  # fmt: skip


def init_towers(config: Config) -> dict[str, Any]:
    """The whole model, a linear map from either side to the common space, scale and bias of the loss."""
    image_key, text_key = jax.random.split(jax.random.key(config.seed))
    widths = MERGED_PATCHES * config.model.encoder.dim, config.model.decoder.dim
    image, text = (
        jax.random.normal(key, (width, _WIDTH)) / width**0.5
        for key, width in zip((image_key, text_key), widths, strict=True)
    )
    model = init_params(config.model, config.objective, config.seed)
    scales = {"scale": jnp.float32(_START_SCALE), "bias": jnp.float32(_START_BIAS)}
    return {"model": model, "image": {"kernel": image}, "text": {"kernel": text}, **scales}


def _optimizer(config: Config) -> optax.GradientTransformation:
    fields = config.optimizer
    return optax.chain(
        optax.clip_by_global_norm(fields.clip_norm),
        optax.adamw(learning_rate_schedule(fields, config.train.num_steps), fields.beta1, fields.beta2, fields.eps,
                    weight_decay=fields.weight_decay, mask=is_decayed),
    )  # fmt: skip


def _train_step(config: Config, optimizer: Any, boi_id: int, towers: Any, state: Any, batch: Batch) -> Any:
    loss, gradients = jax.value_and_grad(lambda own: sigmoid_loss(*embed_pairs(config, own, batch, boi_id), own))(
        towers
    )
    updates, state = optimizer.update(gradients, state, towers)
    return optax.apply_updates(towers, updates), state, loss


def embed_pairs(
    config: Config, towers: dict[str, Any], batch: Batch, boi_id: int
) -> tuple[Float[Array, "R W"], Float[Array, "R W"], Bool[Array, " R"]]:
    """Unit vectors of images and of their captions, and which of the R = rows x places are pairs and no padding.

    The k-th sample of a row has the k-th image, since each has one.
    """
    output: ModelOutput = build(config.model, config.objective, towers["model"])(batch)
    numbers = jnp.arange(1, config.data.row_patches // config.data.image_min_patches + 1)
    of_image = batch.patch_segment_ids[:, None, ::MERGED_PATCHES] == numbers[:, None]
    is_asked = (batch.segment_ids[:, None] == numbers[:, None]) & (batch.tokens == boi_id)[:, None]
    images = jnp.einsum("bku,bum->bkm", of_image.astype(jnp.float32), output.vision.merged)
    texts = jnp.einsum("bkt,btd->bkd", is_asked.astype(jnp.float32), output.hidden)
    is_pair = of_image.any(-1) & is_asked.any(-1)
    return (
        _unit(images @ towers["image"]["kernel"]).reshape(-1, _WIDTH),
        _unit(texts @ towers["text"]["kernel"]).reshape(-1, _WIDTH),
        is_pair.reshape(-1),
    )


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


def sigmoid_loss(images: jax.Array, texts: jax.Array, is_pair: jax.Array, towers: dict[str, Any]) -> jax.Array:
    """-sum log sigmoid(z (t x.y + b)) over all pairs of the batch, by its images; z is 1 of true pairs, else -1.

    Equation 1 of arXiv 2303.15343.
    """
    logits = jnp.exp(towers["scale"]) * images @ texts.T + towers["bias"]
    signs = 2.0 * jnp.eye(len(images)) - 1.0
    counts = is_pair[:, None] & is_pair[None]
    losses = jnp.where(counts, -jax.nn.log_sigmoid(signs * logits), 0.0)
    return losses.sum() / jnp.maximum(is_pair.sum(), 1)


def retrieval(config: Config, towers: dict[str, Any], tokenizer: Any) -> float:
    """Share of unseen captions whose scene is the nearest of `NUM_CANDIDATES`."""
    batches = list(_unseen(config, towers, tokenizer))
    images, texts = (np.concatenate(parts)[:NUM_CANDIDATES] for parts in zip(*batches, strict=True))
    return float(np.mean((texts @ images.T).argmax(axis=1) == np.arange(len(images))))


def _unseen(config: Config, towers: dict[str, Any], tokenizer: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    embed = jax.jit(functools.partial(embed_pairs, config, boi_id=tokenizer.boi_id))
    everything = dataclasses.replace(config, eval=dataclasses.replace(config.eval, validation_rows=0))
    for arrays in validation_batches(everything, tokenizer, "captions"):
        images, texts, is_pair = map(np.asarray, embed(towers, batch=Batch(**jax.tree.map(jnp.asarray, arrays))))
        yield images[is_pair], texts[is_pair]


if __name__ == "__main__":
    sys.exit(main())
