"""Proof at start-up that each loss trains exactly the components that its objective declares.

A miniature twin of the run (same objective, switches and code path; two narrow layers, one device, float32, perturbed
parameters) differentiates every loss, unweighted, and compares which components it reaches with the declared table.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from unihetero_jax.arrays import Batch, LossOutput
from unihetero_jax.config import COMPONENTS, Config, MeshConfig, config_hash, visual_loss_of
from unihetero_jax.model import unihetero
from unihetero_jax.objectives import GRADIENT_TABLE, count_targets, reached
from unihetero_jax.state import ema_components
from unihetero_jax.storage import file_exists, read_bytes, to_path
from unihetero_jax.workdir import write_atomically

Norms = dict[str, dict[str, float]]
FILE_NAME = "gradient_table.json"


def prove(config: Config, loss_terms: Callable[..., LossOutput], workdir: epath.PathLike, report=print) -> Norms:
    """Checks the gradient table of a run and prints it; a workdir that holds the proof for this config skips it.

    Args:
        config: the run.
        loss_terms: `step.loss_terms`, the very function that the run differentiates.
        workdir: where the proof is kept.
        report: receives the printed table.

    Returns:
        {loss: {component: gradient norm}} of the twin.

    Raises:
        ValueError: a loss reaches a component that it must not, or misses one that it must train.
    """
    path = to_path(workdir) / FILE_NAME
    if file_exists(path):
        proof = json.loads(read_bytes(path))
        if proof["config_hash"] == config_hash(config):
            return proof["norms"]
    norms = measure(twin(config), loss_terms)
    report(format_table(config, norms))
    faults = find_faults(config, norms)
    if faults:
        raise ValueError("the gradient table does not hold:\n" + "\n".join(f"  - {fault}" for fault in faults))
    write_atomically(path, json.dumps({"config_hash": config_hash(config), "norms": norms}, indent=1))
    return norms


def twin(config: Config) -> Config:
    """The run in miniature: every switch kept, every size shrunk."""
    model = config.model
    encoder = dataclasses.replace(
        model.encoder, num_layers=2, dim=8, num_heads=2, mlp_dim=16, patch_size=2, position_grid=2, remat="none"
    )
    decoder = dataclasses.replace(
        model.decoder, num_layers=2, dim=8, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=16, vocab_size=16,
        max_grid=4, remat="none",
    )  # fmt: skip
    small = dataclasses.replace(
        model, encoder=encoder, decoder=decoder, compute_dtype="float32",
        projector=dataclasses.replace(model.projector, hidden_dim=8),
        semantic_head=dataclasses.replace(model.semantic_head, hidden_dim=8),
        pixel_decoder=dataclasses.replace(model.pixel_decoder, num_layers=2, dim=8, num_heads=2, mlp_dim=16),
        visual_branch=dataclasses.replace(model.visual_branch, split_layer=min(model.visual_branch.split_layer, 1)),
    )  # fmt: skip
    train = dataclasses.replace(config.train, num_replicates=1, accumulation_steps=1)
    return dataclasses.replace(config, model=small, train=train, mesh=MeshConfig(1, 1, 1, 1))


def measure(config: Config, loss_terms: Callable[..., LossOutput]) -> Norms:
    """The gradient norm of each loss in each component, on perturbed parameters (zeros at start would hide paths)."""
    batch = _twin_batch(config)
    denominators = count_targets(config, batch)

    params = _perturbed_params(config)
    ema = {name: params[name] for name in ema_components(config)}

    @jax.jit
    def gradients(params: dict[str, Any]) -> dict[str, Any]:
        def losses(params):
            sums = loss_terms(config, params, ema, batch, jnp.float32(1.0), denominators).sums
            return {name: sums[name] for name in GRADIENT_TABLE[config.objective]}

        return jax.jacrev(losses)(params)

    def norm(tree: Any) -> float:
        return float(np.sqrt(sum(float(jnp.sum(leaf * leaf)) for leaf in jax.tree.leaves(tree))))

    return {
        loss: {component: norm(tree) for component, tree in by_component.items()}
        for loss, by_component in gradients(params).items()
    }


def _perturbed_params(config: Config) -> dict[str, Any]:
    """Random values for every parameter, gains around 1; drawn by numpy, since compiling a sampler takes seconds."""
    rng = np.random.default_rng(0)
    _, state = unihetero.abstract_model(config.model, config.objective)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray((path[-1].key == "gain") + 0.3 * rng.standard_normal(x.shape), jnp.float32),
        nnx.to_pure_dict(state),
    )


def find_faults(config: Config, norms: Mapping[Any, Mapping[str, float]]) -> list[str]:
    """Every cell of the table that is not as declared."""
    faults = []
    for loss, by_component in norms.items():
        declared = reached(config, loss)
        for component, norm in by_component.items():
            if (norm > 0) != (component in declared):
                expected = "non-zero" if component in declared else "zero"
                faults.append(f"gradient of the {loss} loss in {component}: {norm:.3g}, declared {expected}")
    return faults


def format_table(config: Config, norms: Mapping[str, Mapping[str, float]]) -> str:
    """The table as text: losses by components."""
    components = [name for name in COMPONENTS if name in next(iter(norms.values()))]
    lines = [f"gradient table of objective {config.objective} (miniature twin; norm, 0 = not reached)"]
    lines.append("  loss    " + "".join(f"{name:>15}" for name in components))
    for loss, row in norms.items():
        lines.append(f"  {loss:<8}" + "".join(f"{row[name]:>15.3g}" for name in components))
    return "\n".join(lines)


def _twin_batch(config: Config) -> Batch:
    """One row: `text text boi v v eoi` (generated image), then `boi v v eoi text text` (an image that is read).

    The read one carries the visual loss where a source's read images do. With `cut_input_gradient` it stands for the
    others, of which there have to be some (`config_rules.py`): by them alone text teaches the encoder.
    """
    is_read_image_predicted = any(visual_loss_of(config, name) == "all" for name in config.data.sources)
    also_read = is_read_image_predicted and not config.loss.cut_input_gradient
    visual = np.array([[0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0]], bool)
    carries = np.array([[0, 0, 0, 1, 1, 0, 0, also_read, also_read, 0, 0, 0]], bool)
    boi = np.array([[0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0]])
    length = visual.shape[1]
    patch = config.model.encoder.patch_size
    arrays = {
        "tokens": np.array([[5, 6, 1, 0, 0, 2, 1, 0, 0, 2, 7, 8]]),
        "positions": np.array([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]]),
        "segment_ids": np.array([[1] * 6 + [2] * 6]),
        "branch_ids": np.zeros((1, length)),
        "source_ids": np.zeros((1, length)),
        "text_loss_mask": np.array([[0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 1]], bool),
        "visual_mask": visual,
        "visual_index": np.array([[0, 0, 0, 0, 1, 0, 0, 2, 3, 0, 0, 0]]),
        "visual_loss_mask": carries,
        "boi_grid": boi[..., None] * np.array([1, 2]),
        "patches": np.random.default_rng(0).integers(0, 256, (1, 16, patch * patch * 3)).astype(np.uint8),
        "patch_segment_ids": np.array([[1] * 8 + [2] * 8]),
        "patch_coords": np.array([[[y, 2 * block + x] for block in (0, 1) for y in (0, 1) for x in (0, 1)] * 2]),
        "patch_grid": np.broadcast_to(np.array([2, 4]), (1, 16, 2)),
        "row_hash": np.zeros((1, 2), np.uint32),
    }
    keep = (np.dtype(bool), np.dtype(np.uint8), np.dtype(np.uint32))
    return Batch(**{k: jnp.asarray(v if v.dtype in keep else v.astype(np.int32)) for k, v in arrays.items()})
