"""Every folder of the shared real data through the command line: counts as the folders state them; all of it trains."""

import json
import os
from pathlib import Path

import pytest

from data_pipelines import convert
from unihetero_jax.command_line import parse_config_flags

DATA = Path(os.environ.get("UNIHETERO_REAL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
ROOT = Path(__file__).resolve().parent.parent
SPEC = ["--patch-size=8", "--min-patches=16", "--max-patches=144"]
SETS = {
    "cifar10": (
        ["parquet", "--input", "cifar10/train-*.parquet", "--val-input", "cifar10/val-*.parquet", "--task=pair",
         "--caption-column=caption", "--workers=2"], (48_000, 2_000)),
    "clothing": (["webdataset", "--input", "clothing/0*.tar", "--val-input", "clothing/val-*.tar"], (200, 76)),
    "coco": (
        ["coco", "--input", "coco_captions/captions_train.json", "--images", "coco_captions/images_train.zip",
         "--val-input", "coco_captions/captions_val.json", "--val-images", "coco_captions/images_val.zip"], (130, 150)),
    "nlvr": (
        ["llava", "--input", "nlvr/llava_train.json", "--images", "nlvr/images_train.zip",
         "--val-input", "nlvr/llava_val.json", "--val-images", "nlvr/images_val.zip"], (3_384, 287)),
    "interleaved": (
        ["interleaved", "--input", "interleaved/docs_train.jsonl", "--val-input", "interleaved/docs_val.jsonl",
         "--images", "interleaved/images.zip", "--max-images=1", "--max-chars=300"], None),
    "text": (
        ["text", "--input", "text/tinyshakespeare_train.txt", "--val-input", "text/tinyshakespeare_val.txt",
         "--max-chars=200"], None),
    "sign_digits": (
        ["image_only", "--input", "sign_digits/train.tar", "--val-input", "sign_digits/val.tar"], (500, 100)),
}  # fmt: skip
"""The flags for each folder, and its records for training and validation."""
IS_PATH = ("cifar10/", "clothing/", "coco_captions/", "nlvr/", "interleaved/", "text/", "sign_digits/")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data are not in {DATA}"),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """All sets, prepared."""
    root = tmp_path_factory.mktemp("prepared")
    for number, (name, (flags, _)) in enumerate(SETS.items()):
        paths = [str(DATA / flag) if flag.startswith(IS_PATH) else flag for flag in flags]
        common = [f"--output={root / name}", f"--tokenizer={root / 'tokenizer'}", *SPEC]
        assert convert.main([*paths, *common, *([] if number else ["--train-tokenizer=512"])]) == 0, name
    return root


@pytest.mark.parametrize("name", [name for name, (_, counts) in SETS.items() if counts])
def test_counts_are_those_of_the_raw_folder(prepared, name):
    manifest = json.loads((prepared / name / "manifest.json").read_text())
    dropped = manifest["dropped"]
    assert set(dropped) <= {"duplicate", "duplicate_of_validation"}
    assert sum(manifest["num_records"].values()) + sum(dropped.values()) == sum(SETS[name][1])
    assert manifest["num_records"]["val"] <= SETS[name][1][1]


def test_documents_and_texts_lose_nothing(prepared):
    for name in ("interleaved", "text"):
        manifest = json.loads((prepared / name / "manifest.json").read_text())
        assert set(manifest["dropped"]) <= {"duplicate", "duplicate_of_validation", "empty_text"}, manifest["dropped"]
        assert min(manifest["num_records"].values()) > 10


def test_a_mixture_of_all_of_them_trains(prepared, program, tmp_path):
    roles = {"sign_digits": ["visual_loss=all"], "cifar10": ["order=coin"], "clothing": ["order=coin"]}
    fields = {"data.tokenizer": prepared / "tokenizer", "train.num_steps": 12, "train.eval_every_steps": 12,
              "data.row_tokens": 320, "data.row_patches": 288, "data.image_min_patches": 16, "eval.validation_rows": 8,
              "data.image_max_patches": 144, "checkpoint.every_steps": 12, "train.log_every_steps": 12,
              "model.encoder.num_layers": 1, "model.decoder.num_layers": 1}  # fmt: skip
    flags = [f"--config.{path}={value}" for path, value in fields.items()]
    experiment = tmp_path / "all.py"
    experiment.write_text(
        "from ml_collections import ConfigDict\nfrom experiments import base\n\n\ndef get_config(arg=''):\n"
        "    config = base.get_config(arg)\n    config.data.sources = ConfigDict()\n    return config\n"
    )
    for name in SETS:
        given = ["path=" + str(prepared / name), "weight=1", "augment=none", *roles.get(name, [])]
        flags += [f"--config.data.sources.{name}.{field}" for field in given]
    assert len(parse_config_flags(str(experiment), flags).data.sources) == len(SETS)
    finished = program.run(["train", f"--config={experiment}", f"--workdir={tmp_path / 'run'}", *flags])
    assert finished.code == 0, finished.output
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert all(line["totals"][f"samples/{name}"] > 0 for name in SETS)
    assert all(line["totals"][f"failed/{name}"] == 0 for name in SETS)
    assert line["totals"]["visual_targets/sign_digits"] > 0 and line["totals"]["text_targets/text"] > 0
