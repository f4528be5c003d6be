"""Pretrained weights in: a language model and a vision encoder of Hugging Face become a run's first checkpoint.

    WORKDIR/tokenizer/              the language model's, with this program's special tokens added
    WORKDIR/pretrained/*/           the JSON files of both models, from which `export-hf` takes what is not ours
    WORKDIR/imported.json           where everything came from, and what was left out
    WORKDIR/config.json, checkpoints/0

The components that nobody pretrained (projector, Generation Head, grid embeddings) start as in any run.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from unihetero_jax.checkpoint import Checkpointer, list_steps
from unihetero_jax.config import MERGED_PATCHES, Config, to_dict
from unihetero_jax.config_reading import from_config_dict
from unihetero_jax.data.tokenizer import Tokenizer, extend_tokenizer, load_tokenizer
from unihetero_jax.hf_weights import Source
from unihetero_jax.model.unihetero import Params, init_params
from unihetero_jax.pretrained import FETCHED, Pretrained, fill, load_components, open_pretrained, read_pretrained
from unihetero_jax.safetensors_files import StoredTensor, find_tensors
from unihetero_jax.sharding import make_mesh
from unihetero_jax.step import abstract_state
from unihetero_jax.storage import make_folder, write_bytes
from unihetero_jax.workdir import RunLock, prepare_workdir, write_atomically, write_config

VOCABULARY_MULTIPLE = 128
"""The token table's rows are padded to a multiple of this, which any `mesh.tensor` up to it divides (our choice)."""
EMBEDDINGS = "model.embed_tokens.weight"


def import_pretrained(
    language_model: str,
    vision_encoder: str,
    workdir: epath.PathLike,
    base: Mapping[str, Any],
    override: Callable[[Mapping[str, Any]], Config] = from_config_dict,
    report: Callable[[str], None] = print,
) -> Config:
    """Writes the first checkpoint of a run that starts from pretrained models; training, `generate`, `evaluate` and
    `init_from` take it like any other.

    Args:
        language_model, vision_encoder: folders, or `owner/name@revision` of the hub; one of them may be empty.
        workdir: folder to make.
        base: plain configuration whose architecture is replaced by theirs; sizes of rows and images follow the encoder.
        override: makes the final configuration of it, with the user's own fields.
        report: receives messages for the user.

    Raises:
        ValueError: none is named, a model is not supported, its tensors do not fit, or the workdir has checkpoints.
    """
    if not language_model and not vision_encoder:
        raise ValueError("--language-model, --vision-encoder: name at least one")
    pretrained = read_pretrained(language_model, vision_encoder, base)
    workdir = prepare_workdir(workdir)
    if list_steps(workdir):
        raise ValueError(f"--workdir {workdir}: there is a run already; name another folder")
    with RunLock(workdir):
        values = json.loads(json.dumps(dict(base)))
        tokenizer, num_known = None, 0
        if pretrained.language_folder:
            folder = workdir / "tokenizer"
            tokenizer, num_known = extend_tokenizer(pretrained.language_folder, folder)
            values["data"]["tokenizer"] = str(folder)
        config = override(_with_architecture(values, pretrained, tokenizer, num_known))
        tokenizer = tokenizer or load_tokenizer(config.data.tokenizer)
        target = abstract_state(config, make_mesh(config.mesh)).params
        sources = open_pretrained(pretrained, config, target)
        loaded = load_components(sources, config, target, range(num_known, tokenizer.vocab_size))
        fresh = functools.partial(init_params, config.model, config.objective, config.seed)
        params: Params = fill(loaded, target, fresh)
        write_config(workdir, to_dict(config))
        locations = {"decoder": language_model, "encoder": vision_encoder}
        _keep_files(workdir, sources)
        described = {name: _description(locations[name], source) for name, source in sources.items()}
        write_atomically(workdir / "imported.json", json.dumps(described, indent=2) + "\n")
        checkpointer = Checkpointer(workdir, config, {"tokenizer": tokenizer.hash}, report)
        checkpointer.save(0, {"params": params}, {}, wait=True)
        checkpointer.close()
    for name, source in sources.items():
        left_out = f"; left out: {', '.join(source.left_out)}" if source.left_out else ""
        report(f"{name}: {len(source.tensors)} tensors from {source.folder}{left_out}")
    return config


def _with_architecture(
    values: dict[str, Any], pretrained: Pretrained, tokenizer: Tokenizer | None, num_known: int
) -> dict[str, Any]:
    """The configuration with the architecture of the models, and with sizes that suit it."""
    model, data = values["model"], values["data"]
    if pretrained.vision:
        encoder = pretrained.vision.encoder
        model["encoder"] = dataclasses.asdict(encoder)
        side = encoder.position_grid // 2 * 2
        data["image_max_patches"] = side * side
        data["image_min_patches"] = MERGED_PATCHES if pretrained.vision.family == "siglip2" else side * side
        data["row_patches"] = 4 * side * side
        data["row_tokens"] = max(data["row_tokens"], 1 << (side * side).bit_length())
        model["decoder"]["max_grid"] = max(model["decoder"]["max_grid"], side * side // MERGED_PATCHES)
    if pretrained.language and pretrained.language_folder and tokenizer:
        decoder = pretrained.language.decoder
        rows = max(pretrained.language.num_rows, tokenizer.vocab_size)
        rows = -(-rows // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        max_grid = model["decoder"]["max_grid"]
        model["decoder"] = dataclasses.asdict(decoder) | {"vocab_size": rows, "max_grid": max_grid}
        model["projector"]["hidden_dim"] = model["semantic_head"]["hidden_dim"] = decoder.dim
        table = find_tensors(pretrained.language_folder).get(EMBEDDINGS)
        model["projector"]["output_rms"] = _rms(table, num_known) if table else 0.0
        values["eval"]["chat_template"] = tokenizer.chat is not None
    return values


def _rms(table: StoredTensor, num_rows: int) -> float:
    """Root mean square of the first rows of the token table: visual embeddings start at the scale of tokens."""
    num_rows = min(num_rows, table.shape[0])
    step, total = max((1 << 24) // table.shape[1], 1), 0.0
    for start in range(0, num_rows, step):
        total += float(np.square(table.read((slice(start, min(start + step, num_rows)),)).astype(np.float64)).sum())
    return float(np.float32(math.sqrt(total / (num_rows * table.shape[1]))))


def _keep_files(workdir: epath.Path, sources: Mapping[str, Source]) -> None:
    for name, source in sources.items():
        make_folder(workdir / "pretrained" / name)
        for pattern in FETCHED:
            for path in sorted(source.folder.glob(pattern)):
                if path.suffix != ".safetensors":
                    write_bytes(workdir / "pretrained" / name / path.name, path.read_bytes())


def _description(location: str, source: Source) -> dict[str, Any]:
    return {
        "location": location, "folder": str(Path(source.folder).resolve()), "num_tensors": len(source.tensors),
        "left_out": list(source.left_out),
    }  # fmt: skip
