"""Trained weights out: folders that transformers loads, and the parts that only this program has.

    OUT/language_model/    AutoModelForCausalLM, AutoTokenizer
    OUT/vision_encoder/    SiglipVisionModel, Siglip2VisionModel or CLIPVisionModel; AutoImageProcessor
    OUT/projector/         safetensors under our own names: 2x2 merge, MLP, RMS norm; the grid embeddings of `<boi>`
    OUT/semantic_head/     the Generation Head, where the objective has one
    OUT/pixel_decoder/     the pixel decoder, likewise

Each folder stands alone: config.json, weights, a model card (README.md).
"""

import dataclasses
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from unihetero_jax.checkpoint import read_metadata, valid_step
from unihetero_jax.config import Config
from unihetero_jax.config_reading import from_config_dict
from unihetero_jax.export import MAX_FILE_BYTES, StoredArray, choose_arrays, tokenizer_files, write_weights
from unihetero_jax.hf_config import (
    LANGUAGE_CLASSES,
    VISION_CLASSES,
    VisionFamily,
    language_config,
    language_family,
    vision_config,
    vision_family,
)
from unihetero_jax.hf_weights import Table, language_table, their_tensors, their_values, vision_table
from unihetero_jax.integrity import read_manifest
from unihetero_jax.pretrained import with_leaves
from unihetero_jax.safetensors_files import INDEX, NewTensor, split_by_bytes, write_tensors
from unihetero_jax.storage import file_exists, list_folder, local_target, make_folder, read_bytes, to_path, write_bytes
from unihetero_jax.workdir import write_atomically

OWN_PARTS: Mapping[str, tuple[str, ...]] = {
    "projector": ("projector/", "decoder/grid_height", "decoder/grid_width"),
    "semantic_head": ("semantic_head/",),
    "pixel_decoder": ("pixel_decoder/",),
}
"""Folders of parts that only this program has, and beginnings of the parameters in them."""


@dataclasses.dataclass(frozen=True)
class _Export:
    """What is written, from where: the arrays of a step by path, and how they are read."""

    config: Config
    step_folder: epath.Path
    arrays: Mapping[str, StoredArray]
    dtype: str
    facts: Mapping[str, str]

    @property
    def abstract(self) -> dict[str, Any]:
        leaves = {name: jax.ShapeDtypeStruct(array.shape, jnp.float32) for name, array in self.arrays.items()}
        return with_leaves({}, leaves)

    def read(self, path: str) -> np.ndarray:
        return self.arrays[path].read(self.step_folder)


def export_hugging_face(
    workdir: epath.PathLike,
    step: int | None,
    output: epath.PathLike,
    *,
    averaged: bool = False,
    replicate: int = 0,
    dtype: str = "float32",
    family: VisionFamily | None = None,
    original_vocabulary: bool = False,
    pretrained: str = "",
    max_file_bytes: int = MAX_FILE_BYTES,
    report: Callable[[str], None] = print,
) -> None:
    """Writes a step's parameters as the folders above.

    Args:
        workdir: folder of the run.
        step: None or -1 for the newest step that verifies.
        output: folder to make, local or in a bucket.
        averaged: take the moving averages of the components that have one.
        replicate: which model of a run with several.
        dtype: `float32`, or `bfloat16`, which gives back the very bits of weights that came in as such.
        family: class of the vision encoder; None: CLIP with a class token, else SigLIP 2.
        original_vocabulary: write the rows of the language model that the run started from and its tokenizer, without
            this program's tokens.
        pretrained: workdir of an import, whose JSON files complete ours; empty: this run's, or its `init_from.workdir`.
        max_file_bytes: upper bound on the array bytes of a file.
        report: receives messages for the user.

    Raises:
        CheckpointError: there is no valid step, or the named one is absent or damaged.
        ValueError: the output folder is not empty, no class of Hugging Face computes what the model does, or there is
            no import where one is needed.
    """
    output = to_path(output)
    if list_folder(output):
        raise ValueError(f"--output {output}: not empty; remove it, or name another folder")
    folder = valid_step(workdir, step, report)
    manifest, metadata = read_manifest(folder), read_metadata(folder)
    config = from_config_dict(metadata["config"])
    stored = choose_arrays(manifest["arrays"], metadata["config"], averaged, replicate, dtype, str(folder))
    facts = {
        "step": folder.name, "config_hash": manifest["config_hash"], "program_version": manifest["program_version"],
        "parameters": "averaged" if averaged else "online",
    }  # fmt: skip
    export = _Export(config, folder, {array.name: array for array in stored}, dtype, facts)
    originals = _originals(workdir, config, pretrained)
    _export_language(export, output / "language_model", metadata, originals, original_vocabulary, max_file_bytes)
    _export_vision(export, output / "vision_encoder", originals, family, max_file_bytes)
    for name in OWN_PARTS:
        _export_own(export, output / name, name)
    for path in sorted(list_folder(output)):
        report(f"{path}: {', '.join(sorted(entry.name for entry in list_folder(path)))}")


def _originals(workdir: epath.PathLike, config: Config, pretrained: str) -> epath.Path | None:
    """The kept JSON files of the import that a run came from, if there are any."""
    for place in (pretrained,) if pretrained else (workdir, config.init_from.workdir):
        if place and list_folder(to_path(place) / "pretrained"):
            return to_path(place) / "pretrained"
    if pretrained:
        raise ValueError(f"--pretrained {pretrained}: no workdir of an import (no pretrained/)")
    return None


def _export_language(
    export: _Export, output: epath.Path, metadata: Mapping[str, Any], originals: epath.Path | None,
    original_vocabulary: bool, max_file_bytes: int,
) -> None:  # fmt: skip
    decoder = export.config.model.decoder
    family = language_family(decoder)
    kept = _original_config(originals, "decoder", family)
    if original_vocabulary and not kept:
        raise ValueError("--original-vocabulary: the run comes from no import of a language model; see --pretrained")
    vocabulary = kept["vocab_size"] if original_vocabulary else decoder.vocab_size
    max_positions = kept.get("max_position_embeddings", export.config.data.row_tokens)
    values = language_config(dataclasses.replace(decoder, vocab_size=vocabulary), max_positions, export.dtype)
    dropped = ("rope_theta", "rope_scaling", "torch_dtype", "transformers_version", "auto_map")
    values = {name: value for name, value in kept.items() if name not in dropped} | values
    table = language_table(decoder)
    _write_weights(export, output, table, max_file_bytes, vocabulary if original_vocabulary else 0)
    _write_json(output / "config.json", values)
    if original_vocabulary and originals:
        files = {path.name: path.read_bytes() for path in list_folder(originals / "decoder")}
    else:
        files = tokenizer_files(metadata, "")
        if originals and file_exists(originals / "decoder" / "generation_config.json"):
            files["generation_config.json"] = read_bytes(originals / "decoder" / "generation_config.json")
    for name, content in files.items():
        if name not in ("config.json", INDEX):
            write_bytes(output / name, content)
    _write_card(
        export, output, "language model", LANGUAGE_CLASSES[family],
        f"from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{output.name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{output.name}")',
    )  # fmt: skip


def _export_vision(
    export: _Export, output: epath.Path, originals: epath.Path | None, family: VisionFamily | None, max_file_bytes: int
) -> None:
    encoder = export.config.model.encoder
    natural = vision_family(encoder)
    family = family or _imported_family(originals) or natural
    if (family == "clip") != (natural == "clip"):
        raise ValueError(f"--vision-family {family}: what the encoder computes is that of {natural}")
    _write_weights(export, output, vision_table(encoder, family), max_file_bytes)
    _write_json(output / "config.json", vision_config(encoder, family, export.dtype))
    processor = {"siglip": "SiglipImageProcessor", "siglip2": "Siglip2ImageProcessor", "clip": "CLIPImageProcessor"}
    side = encoder.position_grid * encoder.patch_size
    size = (
        {"patch_size": encoder.patch_size, "max_num_patches": export.config.data.image_max_patches}
        if family == "siglip2"
        else {"size": {"height": side, "width": side}, "do_center_crop": False}
    )
    _write_json(output / "preprocessor_config.json", {
        "image_processor_type": processor[family], "image_mean": list(encoder.pixel_mean),
        "image_std": list(encoder.pixel_std), "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "do_resize": True, "resample": 2, **size,
    })  # fmt: skip
    name = VISION_CLASSES[family]
    _write_card(
        export, output, "vision encoder", name,
        f'from transformers import {name}\n\nencoder = {name}.from_pretrained("{output.name}")',
    )  # fmt: skip


def _imported_family(originals: epath.Path | None) -> VisionFamily | None:
    """Of the encoder that the run started from, so that its weights go out as they came in."""
    if originals is None or not file_exists(originals / "encoder" / "config.json"):
        return None
    model_type = json.loads(read_bytes(originals / "encoder" / "config.json")).get("model_type", "")
    return next((family for family in VISION_CLASSES if model_type in (family, f"{family}_vision_model")), None)


def _export_own(export: _Export, output: epath.Path, name: str) -> None:
    """A part that only this program has, under our own names, with all that its shapes follow from."""
    arrays = {path: array for path, array in export.arrays.items() if path.startswith(OWN_PARTS[name])}
    if not arrays:
        return
    tensors = [NewTensor(path, array.shape, jnp.dtype(array.dtype)) for path, array in arrays.items()]
    make_folder(output)
    with local_target(output / "model.safetensors") as path:
        write_tensors(path, tensors, ((path, export.read(path)) for path in arrays), export.facts)
    model = export.config.model
    _write_json(output / "config.json", {
        "model_type": f"unihetero_{name}", "objective": export.config.objective, "merged_patches": 4,
        "encoder_dim": model.encoder.dim, "decoder_dim": model.decoder.dim, "norm_eps": model.decoder.norm_eps,
        "projector": dataclasses.asdict(model.projector), "semantic_head": dataclasses.asdict(model.semantic_head),
        "pixel_decoder": dataclasses.asdict(model.pixel_decoder), "patch_size": model.encoder.patch_size,
    })  # fmt: skip
    _write_card(
        export, output, name.replace("_", " "), "this program's own",
        f'from safetensors.numpy import load_file\n\nparameters = load_file("{output.name}/model.safetensors")',
    )  # fmt: skip


# ---------------------------------------------------------------- files


def _write_weights(export: _Export, output: epath.Path, table: Table, max_file_bytes: int, vocabulary: int = 0) -> None:
    """One file, or several with an index. A parameter of ours is read once for each file that has a part of it."""
    dtype = np.dtype(jnp.dtype(export.dtype))
    groups = split_by_bytes(their_tensors(table, export.abstract, dtype, vocabulary), max_file_bytes)
    make_folder(output)

    def values(wanted: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
        return their_values(table, export.read, export.abstract, dtype, wanted, vocabulary)

    write_weights(output, groups, values, {"format": "pt", **export.facts})


def _original_config(originals: epath.Path | None, component: str, family: str) -> dict[str, Any]:
    """The kept `config.json` of the model that a component started from; nothing if it is of another family."""
    if originals is None or not file_exists(originals / component / "config.json"):
        return {}
    values = json.loads(read_bytes(originals / component / "config.json"))
    return values if values.get("model_type") == family else {}


def _write_json(path: epath.Path, values: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(values, indent=2) + "\n")


def _write_card(export: _Export, output: epath.Path, what: str, class_name: str, code: str) -> None:
    library = "transformers" if "transformers" in code else "safetensors"
    facts = "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in export.facts.items())
    write_atomically(
        output / "README.md",
        f"""---
library_name: {library}
tags: [unihetero]
---

# {what.capitalize()} of a UniHetero run

Trained with unihetero_jax (UniHetero, arXiv 2512.23512), objective `{export.config.objective}`. Class: {class_name}.

```python
{code}
```

| | |
|---|---|
{facts}
| dtype | {export.dtype} |

The other parts of the model lie in folders beside this one. Licence and limits are those of the weights and the data
that the run started from.
""",
    )
