"""A trained run, ready for use: its parameters, and the evaluation's view of its model."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from unihetero_jax.arrays import Batch
from unihetero_jax.checkpoint import read_metadata, restore_subtree, valid_step
from unihetero_jax.command_line import with_overrides
from unihetero_jax.config import Config
from unihetero_jax.data.tokenizer import Tokenizer, load_tokenizer
from unihetero_jax.evaluation.runner import LogProbs, Model
from unihetero_jax.inference.generate import Prompt, generate_texts
from unihetero_jax.integrity import read_manifest
from unihetero_jax.model.attention import require_segments_alone
from unihetero_jax.model.unihetero import Params, build
from unihetero_jax.sharding import activation_mesh, fetch, local_rows, make_mesh, to_global
from unihetero_jax.state import params_in_use
from unihetero_jax.step import abstract_state
from unihetero_jax.storage import list_folder, to_path
from unihetero_jax.text_loss import text_nll


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run, ready for use. `config` has the command line's overrides; `config_hash` is the trained one's."""

    config: Config
    config_hash: str
    step: int
    params: Params
    tokenizer: Tokenizer


def load_run(workdir: str, step: int, replicate: int, overrides: Sequence[str] = ()) -> Run:
    """A run's parameters on the mesh that its configuration and the overrides ask for.

    Raises:
        ValueError: the workdir is no run, has no valid checkpoint, the replicate does not exist, or the tokenizer at
            the configured path is not the one that it was trained with.
    """
    if not list_folder(to_path(workdir) / "checkpoints"):
        raise ValueError(f"--workdir {workdir}: no run here (no checkpoints/); train first, or correct the path")
    folder = valid_step(workdir, step)
    stored_step, metadata = int(folder.name), read_metadata(folder)
    config = with_overrides(metadata["config"], overrides)
    if not 0 <= replicate < config.train.num_replicates:
        raise ValueError(f"--replicate {replicate}: the run has replicates 0 to {config.train.num_replicates - 1}")
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.hash != metadata.get("data", {}).get("tokenizer", tokenizer.hash):
        raise ValueError(
            f"data.tokenizer: {config.data.tokenizer} holds another tokenizer (hash {tokenizer.hash}) than the "
            f"one that {workdir} was trained with ({metadata['data']['tokenizer']}); name that one by "
            "--config.data.tokenizer"
        )
    state = abstract_state(config, make_mesh(config.mesh))
    averaged = params_in_use({}, _stored_averages(folder, state.ema))
    prefixes = ["params", *(f"ema/{name}" for name in averaged)]
    target: dict[str, Any] = {"params": state.params} | ({"ema": averaged} if averaged else {})
    _, restored, _ = restore_subtree(workdir, stored_step, prefixes, target)
    params = one_replicate(params_in_use(restored["params"], restored.get("ema", {})), config, replicate)
    return Run(config, metadata["config_hash"], stored_step, params, tokenizer)


def _stored_averages(folder: epath.Path, ema: Params) -> Params:
    """Those of the state's averages that a step holds: what was imported has not been averaged yet."""
    names = {name.split("/")[1] for name in read_manifest(folder)["arrays"] if name.startswith("ema/")}
    return {name: tree for name, tree in ema.items() if name in names}


def load_averages(run: Run, workdir: str, replicate: int) -> Params:
    """The averages of a run's state, by component; empty where it keeps none."""
    ema = abstract_state(run.config, make_mesh(run.config.mesh)).ema
    target = _stored_averages(valid_step(workdir, run.step), ema)
    if not target:
        return {}
    prefixes = [f"ema/{name}" for name in target]
    _, restored, _ = restore_subtree(workdir, run.step, prefixes, {"ema": target})
    return one_replicate(restored["ema"], run.config, replicate)


def model_of(run: Run, max_new_tokens: int = 32) -> Model:
    """The evaluation's view of a model."""
    mesh, batch_rows = make_mesh(run.config.mesh), run.config.eval.batch_rows

    def generate(prompts: Sequence[tuple[str, tuple[bytes, ...]]]) -> list[str | None]:
        asked = [Prompt(text, images) for text, images in prompts]
        return generate_texts(run.config, run.params, run.tokenizer, asked, batch_rows, max_new_tokens)

    def own_rows(num_rows: int) -> list[int]:
        return local_rows(mesh, num_rows)

    identity = {"parameters": fingerprint(run.params), "max_new_tokens": max_new_tokens}
    identity["dtype"], identity["objective"] = run.config.model.compute_dtype, run.config.objective
    return Model(make_log_probs(run.config, run.params), own_rows, generate, identity)


def fingerprint(params: Params) -> str:
    """16 hex digits of parameters, the same on every mesh: sums of their bits, which have no rounding."""

    def of(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]).astype(jnp.uint32)
        return jnp.stack([jnp.sum(bits, dtype=jnp.uint32), jnp.sum(bits * bits, dtype=jnp.uint32)])

    sums = jax.jit(lambda tree: jnp.stack([of(x) for x in jax.tree.leaves(tree)]))(params)
    return hashlib.blake2b(fetch(sums).tobytes(), digest_size=8).hexdigest()


def make_log_probs(config: Config, params: Params) -> LogProbs:
    """This process's packed rows in, log-probability of every supervised token out."""
    mesh = make_mesh(config.mesh)
    rows = local_rows(mesh, config.eval.batch_rows)

    def score(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        with activation_mesh(mesh):
            return fetch(_log_probs(config, params, to_global(arrays, mesh)))[rows]

    return score


@functools.partial(jax.jit, static_argnames="config")
def _log_probs(config: Config, params: Params, batch: Batch) -> jax.Array:
    """Of module level, so that each evaluation of a run uses the program that the first one compiled."""
    require_segments_alone(config.model.attention_backend, config.data.turns)
    output = build(config.model, config.objective, params)(batch)
    return -text_nll(output.hidden, output.unembedding, batch.tokens, batch.text_loss_mask, config.loss.text_chunk)[1]


def one_replicate(params: Params, config: Config, replicate: int) -> Params:
    return params if config.train.num_replicates == 1 else jax.tree.map(lambda x: x[replicate], params)
