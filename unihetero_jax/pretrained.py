"""The pretrained models that a run starts from: found, compared with its configuration, loaded as its components."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from unihetero_jax.config import Config, to_dict
from unihetero_jax.config_reading import differences
from unihetero_jax.hf_config import LanguageModel, VisionModel, read_language_model, read_vision_encoder
from unihetero_jax.hf_weights import (
    Source,
    language_table,
    leaf_of,
    load_parameters,
    open_source,
    set_leaf,
    vision_table,
)
from unihetero_jax.model.unihetero import Params, init_params

FETCHED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
"""Of a model of the hub: neither code nor pickled weights."""


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A language model and a vision encoder as their folders describe them; either may be absent."""

    language_folder: Path | None
    language: LanguageModel | None
    vision_folder: Path | None
    vision: VisionModel | None


def local_folder(location: str) -> Path:
    """A folder as it is, or a model of the Hugging Face hub, `owner/name@revision`, copied into its cache.

    Raises:
        ValueError: there is no such folder, and it is no model of the hub with a revision, or cannot be fetched.
    """
    if Path(location).is_dir():
        return Path(location)
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)@([\w./-]+)", location)
    if not match:
        raise ValueError(
            f"{location}: no such folder; of the Hugging Face hub give owner/name@revision, where a commit as revision "
            "makes sure that the same command loads the same weights"
        )
    from huggingface_hub import snapshot_download  # only who names a model of the hub needs it

    try:
        return Path(snapshot_download(match[1], revision=match[2], allow_patterns=list(FETCHED)))
    except Exception as error:  # its errors share no base: no network, no such model, no right
        raise ValueError(f"{location}: cannot be fetched from the Hugging Face hub: {error}") from error


def read_pretrained(language_model: str, vision_encoder: str, config: Mapping[str, Any]) -> Pretrained:
    """What two folders say (empty: none); remat and `max_grid`, which are ours, come from a plain configuration.

    Raises:
        ValueError: a folder is missing, or what it describes is not supported.
    """
    encoder, decoder = config["model"]["encoder"], config["model"]["decoder"]
    language_folder = local_folder(language_model) if language_model else None
    vision_folder = local_folder(vision_encoder) if vision_encoder else None
    return Pretrained(
        language_folder,
        read_language_model(language_folder, decoder["max_grid"], decoder["remat"]) if language_folder else None,
        vision_folder,
        read_vision_encoder(vision_folder, encoder["remat"]) if vision_folder else None,
    )


def check_architecture(config: Config, pretrained: Pretrained) -> None:
    """Raises ValueError if a run's configuration is not that of its pretrained models; names every field."""
    found = to_dict(config)["model"]
    wanted = {"encoder": found["encoder"], "decoder": found["decoder"]}
    own = {
        "encoder": {"attention": config.model.encoder.attention},
        "decoder": {"vocab_size": found["decoder"]["vocab_size"]},
    }
    if pretrained.vision:
        wanted["encoder"] = to_dict(pretrained.vision.encoder) | own["encoder"]
    if pretrained.language:
        wanted["decoder"] = to_dict(pretrained.language.decoder) | own["decoder"]
    changes = differences({name: found[name] for name in wanted}, wanted)
    if changes:
        raise ValueError(
            "the configuration is not that of the pretrained models; set "
            + "; ".join(f"model.{one}" for one in changes)
        )


def open_pretrained(pretrained: Pretrained, config: Config, target: Params) -> dict[str, Source]:
    """The weights by component (`decoder`, `encoder`), compared with the configuration; reads headers alone.

    Raises:
        ValueError: tensors are missing, left over or of another shape.
    """
    sources = {}
    if pretrained.language_folder:
        sources["decoder"] = open_source(pretrained.language_folder, language_table(config.model.decoder), target)
    if pretrained.vision_folder and pretrained.vision:
        table = vision_table(config.model.encoder, pretrained.vision.family)
        sources["encoder"] = open_source(pretrained.vision_folder, table, target)
    return sources


def load_components(sources: Mapping[str, Source], config: Config, target: Params, new_tokens: range) -> Params:
    """Whole components, sharded as in `target`: what the pretrained model lacks of one (the grid embeddings of the
    language model) is fresh, from the run's seed.

    Args:
        sources: from `open_pretrained`.
        config: of the run.
        target: abstract parameters of the run with their shardings.
        new_tokens: ids that the language model's own tokenizer does not know.
    """
    loaded = {name: load_parameters(source, target, new_tokens)[name] for name, source in sources.items()}
    return {name: fill(loaded[name], target[name], functools.partial(_fresh, config, name)) for name in loaded}


def fill(loaded: Params, target: Params, fresh: Any) -> Params:
    """The tree of `target`, with leaves of `loaded` where it has them, else of the tree that `fresh` makes."""
    missing = [path for path in leaf_paths(target) if not _has(loaded, path)]
    if not missing:
        return loaded
    shardings = [leaf_of(target, path).sharding for path in missing]
    # Compiled as one: what is not asked for is never made.
    made = jax.jit(lambda: [leaf_of(fresh(), path) for path in missing], out_shardings=shardings)()
    return with_leaves(loaded, dict(zip(missing, made, strict=True)))


def _fresh(config: Config, component: str) -> Params:
    return init_params(config.model, config.objective, config.seed)[component]


def leaf_paths(tree: Params, prefix: str = "") -> list[str]:
    """Paths of all leaves, as `norm/gain`."""
    paths = []
    for name, value in tree.items():
        paths += leaf_paths(value, f"{prefix}{name}/") if isinstance(value, dict) else [prefix + name]
    return paths


def _has(tree: Params, path: str) -> bool:
    try:
        leaf_of(tree, path)
    except KeyError:
        return False
    return True


def with_leaves(tree: Params, leaves: Mapping[str, Any]) -> Params:
    """A tree with more leaves, by path."""
    result = {name: with_leaves(value, {}) if isinstance(value, dict) else value for name, value in tree.items()}
    for path, value in leaves.items():
        set_leaf(result, path, value)
    return result
