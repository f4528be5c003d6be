"""What every test runs under: eight simulated CPU devices, float32 matrix products, plain and quick compilation whose
results are kept.

The variables are set before anything imports jax, and subprocesses of the tests inherit them. A test that wants one
device takes the first; `pytest -n 2` gives each worker its own eight.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "float32"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ["HF_HUB_OFFLINE"] = "1"
# Eight devices; and compiled as plainly as XLA can, for compiling is nearly all that takes time at these sizes.
os.environ["XLA_FLAGS"] = " ".join([
    "--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false", os.environ.get("XLA_FLAGS", ""),
])  # fmt: skip

import pytest  # noqa: E402

from experiments import base  # noqa: E402
from unihetero_jax.config import Config  # noqa: E402
from unihetero_jax.config_reading import from_config_dict  # noqa: E402

TINY = {
    "model.encoder.num_layers": 2, "model.encoder.dim": 16, "model.encoder.num_heads": 2, "model.encoder.mlp_dim": 32,
    "model.encoder.patch_size": 4, "model.encoder.position_grid": 4,
    "model.projector.hidden_dim": 32,
    "model.decoder.num_layers": 2, "model.decoder.dim": 32, "model.decoder.num_heads": 4,
    "model.decoder.num_kv_heads": 2, "model.decoder.head_dim": 8, "model.decoder.mlp_dim": 64,
    "model.decoder.vocab_size": 64, "model.decoder.max_grid": 16,
    "model.semantic_head.hidden_dim": 32,
    "data.sources": {"only": {"path": "nowhere", "weight": 1.0, "augment": "none"}},
    "data.row_tokens": 32, "data.row_patches": 32, "data.image_min_patches": 4, "data.image_max_patches": 16,
    "data.num_data_shards": 2, "data.window_size": 16,
    "train.num_steps": 10, "train.global_batch_rows": 4,
    "eval.batch_rows": 4,
    # Not the default: the averaged target is the one with the most to go wrong.
    "loss.target": "ema", "loss.cut_input_gradient": False,
}  # fmt: skip


def make_tiny_config(**changes: object) -> Config:
    """The base experiment with a model that compiles in a second; `changes` use `__` for dots: `train__num_steps=3`."""
    config_dict = base.get_config()
    for path, value in (TINY | {name.replace("__", "."): value for name, value in changes.items()}).items():
        section, _, name = path.rpartition(".")
        target = config_dict
        for part in section.split(".") if section else ():
            target = target[part]
        with target.ignore_type():
            target[name] = value
    return from_config_dict(config_dict)


@pytest.fixture
def tiny_config():
    """The function that builds a tiny configuration: `tiny_config(train__num_steps=3)`."""
    return make_tiny_config


@pytest.fixture
def repo_root() -> Path:
    return ROOT


TINY_MODEL = {
    "model.encoder.num_layers": 1, "model.encoder.dim": 16, "model.encoder.num_heads": 2, "model.encoder.mlp_dim": 32,
    "model.projector.hidden_dim": 32,
    "model.decoder.num_layers": 1, "model.decoder.dim": 32, "model.decoder.num_heads": 2,
    "model.decoder.num_kv_heads": 1, "model.decoder.head_dim": 16, "model.decoder.mlp_dim": 64,
    "model.decoder.vocab_size": 320, "model.decoder.max_grid": 16,
    "model.semantic_head.hidden_dim": 32,
    "train.num_steps": 8, "train.global_batch_rows": 4, "train.log_every_steps": 1, "train.eval_every_steps": 1000,
    "checkpoint.every_steps": 2, "checkpoint.keep_last": 2,
    "data.row_tokens": 192, "data.row_patches": 144, "data.num_data_shards": 4, "data.window_size": 64,
    "eval.batch_rows": 4, "eval.validation_rows": 4, "eval.rollout_source": "", "eval.benchmarks": {},
}  # fmt: skip
"""Overrides that shrink the quickstart to what a test trains in a second; tests that agree share compilation."""
TINY_SCENES = 200


def tiny_overrides(world: Path, **changes: object) -> list[str]:
    """`--config.` flags for the quickstart on `world`; `changes` use `__` for dots and come last."""
    paths = {
        "scene_world.path": world, "scene_world.num_scenes": TINY_SCENES, "scene_world.items_per_kind": 3,
        "data.tokenizer": world / "tokenizer",
        "data.sources.qa.path": world / "qa", "data.sources.generation.path": world / "generation",
    }  # fmt: skip
    fields = paths | TINY_MODEL | {name.replace("__", "."): value for name, value in changes.items()}
    return [f"--config.{name}={value}" for name, value in fields.items()]


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory) -> Path:
    """A scene world of 200 scenes and a few questions, as the tiny quickstart reads it. Read-only."""
    from data_pipelines.scene_world import write_scene_world
    from unihetero_jax.data.records import ImageSpec

    path = tmp_path_factory.mktemp("tiny_world") / "world"
    vocab_size = TINY_MODEL["model.decoder.vocab_size"]
    write_scene_world(path, "easy", TINY_SCENES, ImageSpec(8, 36, 36), vocab_size, items_per_kind=3)
    return path


@pytest.fixture(scope="session")
def tiny_flags(tiny_world):
    """The function that gives the command line's overrides: `tiny_flags(objective="understanding")`."""
    return lambda **changes: tiny_overrides(tiny_world, **changes)


@pytest.fixture(scope="session")
def tiny_experiment(tiny_flags):
    """The function that builds the tiny quickstart's configuration: `tiny_experiment(train__num_steps=3)`."""
    from unihetero_jax.command_line import parse_config_flags

    return lambda **changes: parse_config_flags(str(ROOT / "experiments" / "quickstart.py"), tiny_flags(**changes))


@pytest.fixture(scope="session")
def program():
    """Runs commands in processes of their own that may be killed: `program.run(["train", ...], kill_at="...")`."""
    from tests.fork_server import ForkServer

    with ForkServer(ROOT) as server:
        yield server


@pytest.fixture
def refused(capsys):
    """Runs a command that has to fail as the user's mistake: exit code 2, one message, no traceback."""
    from unihetero_jax.cli import main

    def run(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse's own way out
            code = stop.code
        printed = capsys.readouterr()
        assert code == 2, printed.out + printed.err
        assert "Traceback" not in printed.err and "error: " in printed.err
        return printed.err

    return run
