"""Exported parameters, read back with the safetensors library alone, against the stored arrays bit for bit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from tests.test_checkpoint import make_config, position_of
from tests.test_stored_steps import damage
from unihetero_jax import cli
from unihetero_jax.checkpoint import Checkpointer, CheckpointError, restore_subtree
from unihetero_jax.config import to_dict
from unihetero_jax.data.tokenizer import load_tokenizer, train_tokenizer
from unihetero_jax.export import export_parameters

SHAPES = {
    "encoder": {"kernel": (3, 8, 5), "bias": (5,), "gain": ()},
    "decoder": {"blocks": {"up": (2, 40, 30), "down": (2, 30, 40)}, "embedding": (64, 12)},
}


def make_arrays(seed, lead=()):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(lead + shape), jnp.float32), SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )  # fmt: skip


def write_run(folder, num_replicates=1):
    """Steps 1 and 2 of a run whose encoder has an average, and its tokenizer; returns the workdir."""
    tokenizer = train_tokenizer(["a picture of a red square"] * 9, 300, folder / "tokenizer")
    config = make_config(
        **{"data.tokenizer": str(folder / "tokenizer"), "train.num_replicates": num_replicates, "eval.benchmarks": {}}
    )
    lead = () if num_replicates == 1 else (num_replicates,)
    checkpointer = Checkpointer(folder / "run", config, {"tokenizer": tokenizer.hash, "sources": {}})
    for step in (1, 2):
        state = {
            "step": jnp.int32(step), "params": make_arrays(step, lead),
            "ema": {"encoder": make_arrays(step + 100, lead)["encoder"]},
        }  # fmt: skip
        checkpointer.save(step, state, position_of(step))
    checkpointer.close()
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("export"))


def flat(tree):
    return {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def stored(workdir, step, part="params"):
    return flat(restore_subtree(workdir, step, [part])[1][part])


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        assert found[name].tobytes() == np.asarray(value).tobytes(), name


def test_one_file_holds_the_newest_step_bit_for_bit(run, tmp_path):
    export_parameters(run, None, tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"}
    assert_same_bits(load_file(tmp_path / "out" / "model.safetensors"), stored(run, 2))
    with safe_open(tmp_path / "out" / "model.safetensors", "numpy") as file:
        assert file.metadata()["step"] == "2" and file.metadata()["parameters"] == "online"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads(json.dumps(restore_subtree(run, 2, ["step"])[2]["config"]))
    assert config["data"] == json.loads(json.dumps(to_dict(make_config())["data"])) | {
        "tokenizer": str(run.parent / "tokenizer")
    }
    assert load_tokenizer(tmp_path / "out").hash == load_tokenizer(run.parent / "tokenizer").hash


def test_files_are_bounded_and_the_index_names_each_array_once(run, tmp_path):
    limit, out = 10_000, tmp_path / "out"
    flags = [f"--workdir={run}", f"--output={out}", "--step=1", f"--max-file-gb={limit / 1e9}"]
    assert cli.main(["checkpoints", "export", *flags]) == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    names = sorted(path.name for path in out.glob("*.safetensors"))
    assert names == [f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)]
    assert len(names) >= 2 and set(index["weight_map"].values()) == set(names)
    found = {}
    for name in names:
        content = load_file(out / name)
        assert {key for key, file in index["weight_map"].items() if file == name} == content.keys()
        assert not found.keys() & content.keys()
        assert len(content) == 1 or sum(value.nbytes for value in content.values()) <= limit
        found |= content
    assert_same_bits(found, stored(run, 1))
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())


def test_averages_replace_the_components_that_have_one(run, tmp_path):
    export_parameters(run, 2, tmp_path / "out", averaged=True)
    expected = stored(run, 2) | stored(run, 2, "ema")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert_same_bits(found, expected)
    assert found["encoder/bias"].tobytes() != np.asarray(stored(run, 2)["encoder/bias"]).tobytes()


def test_bfloat16_is_the_nearest_value(run, tmp_path):
    export_parameters(run, 2, tmp_path / "out", dtype="bfloat16")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert_same_bits(found, {name: jnp.asarray(value).astype(jnp.bfloat16) for name, value in stored(run, 2).items()})


def test_one_replicate_of_several(tmp_path):
    workdir = write_run(tmp_path, num_replicates=3)
    export_parameters(workdir, 2, tmp_path / "out", replicate=1)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert_same_bits(found, {name: value[1] for name, value in stored(workdir, 2).items()})
    with pytest.raises(ValueError, match="--replicate 3: the run has replicates 0 to 2"):
        export_parameters(workdir, 2, tmp_path / "other", replicate=3)


def test_a_damaged_step_is_refused_and_nothing_is_written(tmp_path):
    workdir = write_run(tmp_path)
    name = damage(workdir, 2)
    with pytest.raises(CheckpointError, match=f"checkpoint 2 is damaged: file .*{name}"):
        export_parameters(workdir, 2, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    messages = []
    export_parameters(workdir, None, tmp_path / "out", report=messages.append)
    assert "checkpoint 2 is damaged, passed over" in messages[0]
    assert_same_bits(load_file(tmp_path / "out" / "model.safetensors"), stored(workdir, 1))


def test_what_cannot_be_exported_is_refused_with_the_remedy(run, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    train_tokenizer(["another"] * 9, 290, tmp_path / "another")
    for flags, words in (
        ([f"--output={tmp_path / 'full'}"], "not empty; remove it, or name another folder"),
        ([], "name a folder to write"),
        ([f"--output={tmp_path / 'out'}", "--dtype=float8"], "--dtype 'float8': give float32 or bfloat16"),
        ([f"--output={tmp_path / 'out'}", "--step=7"], "no complete checkpoint of step 7"),
        ([f"--output={tmp_path / 'out'}", f"--tokenizer={tmp_path / 'another'}"], "another tokenizer"),
        ([f"--output={tmp_path / 'out'}", f"--tokenizer={tmp_path / 'nowhere'}"], "by --tokenizer"),
        ([f"--output={tmp_path / 'out'}", "--max-file-gb=0"], "--max-file-gb"),
    ):
        assert cli.main(["checkpoints", "export", f"--workdir={run}", *flags]) == 2
        assert words in capsys.readouterr().err, flags
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"] and not (tmp_path / "out").exists()
