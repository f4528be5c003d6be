"""The same checks against torch, live, with other random weights; needs torch: `make parity`."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed; `make parity` has it")

import torch
import transformers
from test_hf_import import imported

from parity import models
from parity.checks import check_language, check_vision
from parity.golden import FOLDER, LANGUAGE_MODELS, VISION_ENCODERS
from unihetero_jax.cli import main
from unihetero_jax.data.tokenizer import load_tokenizer
from unihetero_jax.hf_config import VISION_CLASSES

SEEDS = (1, 2)
pytestmark = pytest.mark.filterwarnings("default")  # those of torch and transformers are theirs


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_model(name, seed, tmp_path):
    check_language(tmp_path, models.language_outputs(models.make(name, seed, tmp_path), seed))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", VISION_ENCODERS)
def test_vision_encoder(name, seed, tmp_path):
    check_vision(tmp_path, models.vision_outputs(models.make(name, seed, tmp_path), name, seed))


@pytest.mark.parametrize(("language", "vision"), [("qwen3", "clip"), ("qwen2", "siglip"), ("llama3", "siglip2")])
def test_transformers_loads_what_was_imported_and_exported(tmp_path, language, vision):
    """Every part by its class, complete; the language model computes what it computed before."""
    workdir, language_folder, _ = imported(tmp_path, language, vision)
    out = tmp_path / "out"
    assert main(["export-hf", f"--workdir={workdir}", f"--output={out}"]) == 0
    load = transformers.AutoModelForCausalLM.from_pretrained
    ours, report = load(out / "language_model", output_loading_info=True)
    assert not any(report.values()), report
    num_known = load_tokenizer(language_folder).num_known
    tokens = torch.arange(2 * 20).reshape(2, 20) % num_known
    with torch.no_grad():
        logits = [model.float().eval()(tokens).logits for model in (ours, load(language_folder))]
    assert torch.equal(logits[0][..., :num_known], logits[1][..., :num_known])
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "language_model")
    assert tokenizer.encode("what is this", add_special_tokens=False) == load_tokenizer(language_folder).encode(
        "what is this"
    )
    vision_class = getattr(transformers, VISION_CLASSES[vision])
    _, report = vision_class.from_pretrained(out / "vision_encoder", output_loading_info=True)
    assert not any(report.values()), report
    assert transformers.AutoImageProcessor.from_pretrained(out / "vision_encoder").image_mean


def test_every_family_has_golden_arrays():
    assert (tuple(models.LANGUAGE_MODELS), tuple(models.VISION_ENCODERS)) == (LANGUAGE_MODELS, VISION_ENCODERS)


def test_the_golden_arrays_are_what_torch_computes():
    with np.load(FOLDER / "qwen3" / "expected.npz") as stored:
        model = models.make_from(FOLDER / "qwen3")
        found = models.language_outputs(model, 0)
        for name in stored.files:
            np.testing.assert_allclose(found[name], stored[name], atol=1e-5, err_msg=name)
