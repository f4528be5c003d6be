"""`--config` files and overrides: what is applied, and how faults are named."""

import argparse
import json
import typing

import pytest

from unihetero_jax.command_line import load_experiment, parse_arguments, parse_config_flags, with_overrides
from unihetero_jax.config import ConfigError, Objective, to_dict


@pytest.fixture
def experiment(tmp_path, tiny_config):
    """A file whose get_config returns the tiny configuration, its argument as the number of steps."""
    values = to_dict(tiny_config())
    path = tmp_path / "small.py"
    path.write_text(
        "import json\n"
        "from ml_collections import ConfigDict\n"
        f"VALUES = json.loads({json.dumps(json.dumps(values))})\n"
        "def get_config(arg=''):\n"
        "    config = ConfigDict(VALUES)\n"
        "    if arg:\n"
        "        config.train.num_steps = int(arg)\n"
        "    return config\n"
    )
    return str(path)


def test_file_without_overrides_is_the_experiment(experiment, tiny_config):
    assert parse_config_flags(experiment, []) == tiny_config()


def test_argument_reaches_get_config(experiment):
    assert parse_config_flags(f"{experiment}:77", []).train.num_steps == 77


def test_overrides_are_typed_by_their_field(experiment):
    config = parse_config_flags(experiment, [
        "--config.optimizer.learning_rate=1e-3",
        "--config.optimizer.clip_norm=2",
        "--config.train.num_steps=7",
        "--config.train.num_steps=9",
        "objective=understanding",
        "optimizer.frozen=encoder,projector",
        "init_from.workdir=123",
        "init_from.components=('decoder',)",
        "model.decoder.qk_norm=false",
        "scene_world.level=none",
        "eval.benchmarks.colours=some/file.tsv",
    ])  # fmt: skip
    assert config.optimizer.learning_rate == 1e-3
    assert config.optimizer.clip_norm == 2.0 and isinstance(config.optimizer.clip_norm, float)
    assert config.train.num_steps == 9
    assert config.objective == "understanding"
    assert config.optimizer.frozen == ("encoder", "projector")
    assert config.init_from.workdir == "123"
    assert config.init_from.components == ("decoder",)
    assert config.model.decoder.qk_norm is False
    assert config.scene_world.level == "none"
    assert dict(config.eval.benchmarks) == {"colours": "some/file.tsv"}


def test_empty_value_empties_a_tuple(experiment):
    assert parse_config_flags(experiment, ["optimizer.frozen="]).optimizer.frozen == ()


def test_named_entries_change_and_grow(experiment):
    config = parse_config_flags(experiment, [
        "data.sources.only.weight=3",
        "data.sources.more.path=elsewhere", "data.sources.more.weight=.5", "data.sources.more.augment=none",
    ])  # fmt: skip
    assert config.data.sources["only"].weight == 3.0
    assert config.data.sources["more"].path == "elsewhere"


def test_all_faults_at_once_with_dotted_paths_and_hints(experiment):
    with pytest.raises(ConfigError) as caught:
        parse_config_flags(experiment, [
            "trian.num_steps=3",
            "train.num_step=3",
            "train.log_every_steps=ten",
            "objective=semantic_inputs",
            "data.sources.onyl.weight=2",
            "seed.x=1",
            "train.num_steps",
        ])  # fmt: skip
    assert caught.value.faults == [
        "trian.num_steps: unknown field; did you mean train.num_steps?",
        "train.num_step: unknown field; did you mean train.num_steps?",
        "seed.x: seed is no section",
        "train.num_steps: an override needs a value: --config.train.num_steps=value",
        "data.sources.onyl: no such entry; did you mean data.sources.only?; a new one also needs path, augment",
        f"objective: 'semantic_inputs' is none of {', '.join(map(repr, typing.get_args(Objective)))}"
        " (did you mean 'semantic_input'?)",
        "train.log_every_steps: expected int, got 'ten' (str)",
    ]


def test_a_section_is_not_a_value(experiment):
    with pytest.raises(ConfigError, match="train: expected a section, got 5"):
        parse_config_flags(experiment, ["train=5"])
    with pytest.raises(ConfigError, match=r"train\.num_steps: train is no section"):
        parse_config_flags(experiment, ["train=5", "train.num_steps=3"])


def test_fractions_are_not_rounded_into_integers(experiment):
    with pytest.raises(ConfigError, match=r"train\.num_steps: expected int, got 2.5"):
        parse_config_flags(experiment, ["train.num_steps=2.5"])


def test_stored_config_takes_overrides_and_stays_as_it_is(tiny_config):
    stored = to_dict(tiny_config())
    before = json.dumps(stored)
    assert with_overrides(stored, ["eval.batch_rows=8"]).eval.batch_rows == 8
    assert json.dumps(stored) == before


def test_missing_file_names_the_near_ones(experiment):
    with pytest.raises(ValueError, match=r"no file .*smal\.py; did you mean .*small\.py\?"):
        load_experiment(experiment.replace("small.py", "smal.py"))
    with pytest.raises(ValueError, match=r"did you mean .*/small\.py\?"):
        load_experiment(experiment.removesuffix(".py"))


def test_files_that_are_no_experiment(tmp_path):
    def written(text):
        path = tmp_path / "x.py"
        path.write_text(text)
        return str(path)

    with pytest.raises(ValueError, match=r"x\.py defines no function get_config"):
        load_experiment(written("get_config = 3\n"))
    with pytest.raises(ValueError, match=r"x\.py returned list, expected a ConfigDict"):
        load_experiment(written("def get_config(arg=''):\n    return []\n"))
    with pytest.raises(ValueError, match=r"get_config of .*x\.py takes no argument"):
        load_experiment(written("def get_config():\n    return {}\n") + ":a")
    with pytest.raises(ValueError, match=r"x\.py: the file cannot be loaded: .*line 1"):
        load_experiment(written("def :\n"))
    text_file = tmp_path / "x.txt"
    text_file.write_text("")
    with pytest.raises(ValueError, match=r"x\.txt: not a Python file"):
        load_experiment(str(text_file))


def _parser():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    commands = parser.add_subparsers(dest="command")
    train = commands.add_parser("train", allow_abbrev=False)
    train.add_argument("--config")
    train.add_argument("--workdir")
    commands.add_parser("generate", allow_abbrev=False).add_argument("--prompt")
    return parser


def test_flags_and_overrides_may_be_mixed():
    flags, overrides = parse_arguments(
        _parser(),
        ["train", "--config.seed=3", "--config=a.py", "--config.objective", "understanding", "--workdir", "w"],
    )
    assert (flags.command, flags.config, flags.workdir) == ("train", "a.py", "w")
    assert overrides == ["seed=3", "objective=understanding"]


def test_unknown_flags_are_refused_with_a_hint():
    with pytest.raises(ValueError) as caught:
        parse_arguments(_parser(), ["train", "--wrkdir=x", "--zzz", "stray"])
    assert str(caught.value).splitlines() == [
        "--wrkdir: unknown flag; did you mean --workdir?",
        "--zzz: unknown flag; flags here: -h, --help, --config, --workdir",
        "'stray': unexpected argument; flags are written --name=value",
    ]
