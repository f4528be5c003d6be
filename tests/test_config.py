"""The configuration: round trip, faults, and the resolved fields of every experiment.

`tests/golden_configs/<experiment>.json` pins what each experiment resolves to, so that a changed default is seen in
review. After an intended change: `UPDATE_GOLDEN=1 .venv/bin/python -m pytest tests/test_config.py -k golden`.
"""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from experiments import base
from unihetero_jax import config_reading as config_lib
from unihetero_jax.command_line import load_experiment
from unihetero_jax.config import Config, ConfigError, config_hash, to_dict
from unihetero_jax.config_reading import differences, from_config_dict

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden_configs"
EXPERIMENTS = sorted(
    path
    for path in (ROOT / "experiments").glob("*.py")
    if "def get_config(" in path.read_text() and path.stem != "base"
)


@pytest.fixture
def values(tiny_config):
    """The tiny configuration as plain values, free to be broken."""
    return to_dict(tiny_config())


def faults_of(values):
    with pytest.raises(ConfigError) as caught:
        from_config_dict(values)
    return caught.value.faults


def test_round_trip(values, tiny_config):
    config = tiny_config(optimizer__frozen=("encoder",), eval__benchmarks={"a": "b.tsv"})
    assert from_config_dict(to_dict(config)) == config
    assert from_config_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert from_config_dict(ConfigDict(values)) == from_config_dict(values)


def test_frozen_all_the_way_down(tiny_config):
    config = tiny_config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.num_steps = 3
    with pytest.raises(TypeError):
        config.data.sources["other"] = config.data.sources["only"]


def test_every_field_of_the_dataclasses_has_a_default_in_base():
    """base.py is complete but for the sources and the tokenizer, which an experiment names."""
    values = load_experiment(str(ROOT / "experiments" / "base.py"))
    assert from_config_dict(values).data.sources == {}


def test_unknown_fields_carry_their_path_and_a_hint(values):
    values["train"]["num_step"] = 3
    values["optimiser"] = {}
    values["data"]["sources"]["only"]["wieght"] = 1.0
    values["mesh"]["qqqqqq"] = 1
    assert sorted(faults_of(values)) == [
        "data.sources.only.wieght: unknown field; did you mean data.sources.only.weight?",
        "mesh.qqqqqq: unknown field; fields here: data, fsdp, tensor, context, num_slices",
        "optimiser: unknown field; did you mean optimizer?",
        "train.num_step: unknown field; did you mean train.num_steps?",
    ]


def test_missing_fields_are_named(values):
    del values["loss"]["ema_decay"], values["mesh"]
    assert faults_of(values) == [
        "loss.ema_decay: missing (defaults are in experiments/base.py)",
        "mesh: missing (defaults are in experiments/base.py)",
    ]


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("train", "num_steps", "10", "train.num_steps: expected int, got '10' (str)"),
        ("train", "num_steps", 10.0, "train.num_steps: expected int, got 10.0 (float)"),
        ("train", "num_steps", True, "train.num_steps: expected int, got True (bool)"),
        ("train", "num_steps", None, "train.num_steps: expected int, got None (NoneType)"),
        ("loss", "cut_input_gradient", 1, "loss.cut_input_gradient: expected bool, got 1 (int)"),
        ("optimizer", "eps", "tiny", "optimizer.eps: expected float, got 'tiny' (str)"),
        ("optimizer", "eps", True, "optimizer.eps: expected float, got True (bool)"),
        ("optimizer", "frozen", 3, "optimizer.frozen: expected a list, got 3"),
        ("data", "tokenizer", 3, "data.tokenizer: expected str, got 3 (int)"),
        ("data", "sources", [], "data.sources: expected a section of named entries, got []"),
        ("data", "sources", {"a": 3}, "data.sources.a: expected a section, got 3"),
        ("eval", "benchmarks", {"a": 3}, "eval.benchmarks.a: expected str, got 3 (int)"),
        (
            "optimizer", "schedule", "cosin",
            "optimizer.schedule: 'cosin' is none of 'cosine', 'warmup_stable_decay' (did you mean 'cosine'?)",
        ),
    ],
)  # fmt: skip
def test_ill_typed(values, section, field, value, message):
    values[section][field] = value
    assert faults_of(values) == [message]


def test_entries_of_a_tuple_are_checked(values):
    values["optimizer"]["frozen"] = ["encoder", "decodr"]
    (fault,) = faults_of(values)
    assert fault.startswith("optimizer.frozen[1]: 'decodr' is none of") and "did you mean 'decoder'?" in fault


def test_whole_numbers_serve_as_floats(values):
    values["optimizer"]["learning_rate"] = 1
    learning_rate = from_config_dict(values).optimizer.learning_rate
    assert learning_rate == 1.0 and isinstance(learning_rate, float)


BROKEN = {
    "model.encoder.num_heads": (3, "model.encoder.dim 16 must be a multiple of model.encoder.num_heads 3"),
    "model.decoder.head_dim": (7, "model.decoder.head_dim 7 must be even"),
    "model.attention_backend": ("splash", "model.attention_backend=splash cannot mask independent turns of a sample"),
    "data.row_patches": (30, "data.row_patches 30 must be a multiple of 4"),
    "data.image_min_patches": (17, "data.image_min_patches 17 must lie between 1 and data.image_max_patches 16"),
    "data.sources.only.weight": (0.0, "data.sources.only.weight 0.0 must be positive"),
    "data.num_data_shards": (3, "train.global_batch_rows 4 and data.num_data_shards 3: one must divide the other"),
    "train.accumulation_steps": (3, "train.global_batch_rows 4 must be a multiple of train.accumulation_steps 3"),
    "train.num_steps": (0, "train.num_steps 0 must be positive"),
    "optimizer.beta2": (1.0, "optimizer.beta1 and beta2 must lie in [0, 1)"),
    "optimizer.final_lr_ratio": (1.5, "optimizer.final_lr_ratio 1.5 must lie in [0, 1]"),
    "optimizer.frozen": (
        ["encoder", "projector", "decoder", "semantic_head"],
        "optimizer.frozen freezes every component",
    ),
    "loss.ema_decay": (1.0, "loss.ema_decay 1.0 must lie in [0, 1)"),
    "loss.target_norm": ("l2", "loss.visual_loss=cosine normalises already"),
    "init_from.workdir": ("runs/x", "init_from.workdir is set but init_from.components is empty"),
    "checkpoint.keep_last": (0, "checkpoint.keep_last 0 must be positive"),
    "mesh.context": (3, "data.row_tokens 32 must be a multiple of mesh.context 3"),
    "mesh.num_slices": (2, "mesh.data 1 must be a multiple of mesh.num_slices 2"),
    "mesh.tensor": (4, "model.decoder.num_kv_heads 2 must be a multiple of mesh.tensor 4"),
    "mesh.fsdp": (3, "model.decoder.dim 32 must be a multiple of mesh.fsdp 3"),
    "eval.validation_rows": (-1, "eval.validation_rows must not be negative"),
}


def set_field(values, path, value):
    *sections, name = path.split(".")
    for section in sections:
        values = values[section]
    values[name] = value


@pytest.mark.parametrize("path", BROKEN)
def test_each_invalid_combination(values, path):
    value, message = BROKEN[path]
    set_field(values, path, value)
    assert any(fault.startswith(message) for fault in faults_of(values)), faults_of(values)


def test_all_invalid_combinations_at_once(values):
    for path, (value, _) in BROKEN.items():
        set_field(values, path, value)
    faults = faults_of(values)
    missing = [message for _, message in BROKEN.values() if not any(fault.startswith(message) for fault in faults)]
    assert missing == []
    assert str(ConfigError(faults)).count("\n") == len(faults)


def test_the_tiny_configuration_divides_over_eight_devices(tiny_config):
    for mesh in ({"mesh__data": 4, "mesh__tensor": 2}, {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}):
        assert isinstance(tiny_config(**mesh), Config)


def test_hash_names_the_values_and_nothing_else(values):
    config = from_config_dict(values)
    shuffled = {name: values[name] for name in reversed(values)}
    assert config_hash(from_config_dict(shuffled)) == config_hash(config)
    changed = copy.deepcopy(values)
    changed["optimizer"]["eps"] *= 2
    assert config_hash(from_config_dict(changed)) != config_hash(config)
    script = (
        "import json, sys; from unihetero_jax.config import config_hash; "
        "from unihetero_jax.config_reading import from_config_dict;"
        "print(config_hash(from_config_dict(json.load(sys.stdin))))"
    )
    other = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(values), capture_output=True, text=True, check=True, cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert other.stdout.strip() == config_hash(config)


def test_differences_are_dotted(values):
    changed = copy.deepcopy(values)
    changed["train"]["num_steps"] = 11
    changed["eval"]["benchmarks"] = {"a": "b"}
    assert differences(values, changed) == ["eval.benchmarks.a: '(absent)' -> 'b'", "train.num_steps: 10 -> 11"]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_golden_config(path):
    resolved = to_dict(from_config_dict(load_experiment(str(path))))
    golden = GOLDEN / f"{path.stem}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        golden.write_text(json.dumps(resolved, indent=1) + "\n")
    assert golden.exists(), f"{golden} is missing; UPDATE_GOLDEN=1 writes it"
    changes = differences(json.loads(golden.read_text()), resolved)
    assert not changes, f"{path.name} resolves differently; if intended, run with UPDATE_GOLDEN=1:\n" + "\n".join(
        changes
    )


def test_no_golden_config_is_left_over():
    assert {path.stem for path in GOLDEN.glob("*.json")} <= {path.stem for path in EXPERIMENTS}


def test_every_section_is_reachable_by_its_dotted_path(values):
    """The names that scripts rely on."""
    flat = config_lib._flatten(values)
    for name in (
        "objective", "seed", "train.num_steps", "train.log_every_steps", "train.global_batch_rows",
        "checkpoint.every_steps", "mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.context", "data.num_data_shards",
        "data.row_tokens", "data.row_patches",
    ):  # fmt: skip
        assert name in flat


def test_the_input_cut_needs_a_source_whose_text_teaches_the_encoder():
    """Images alone beside other sources are fine; a visual loss on all images of all sources is not."""
    values = base.get_config().to_dict()
    source = {"path": "x", "weight": 1.0, "augment": "none"}
    values["data"]["sources"] = {"images": source | {"visual_loss": "all"}, "questions": source}
    assert from_config_dict(values).loss.cut_input_gradient
    values["loss"]["visual_loss_on"] = "all"
    with pytest.raises(ConfigError, match=r"all images of all sources would train encoder .* loss.target=ema"):
        from_config_dict(values)
    values["loss"]["cut_input_gradient"] = False
    from_config_dict(values)
