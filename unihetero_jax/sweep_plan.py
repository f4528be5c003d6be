"""What a sweep consists of: runs with names, from a sweep file or from the product of several values."""

import dataclasses
import itertools
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unihetero_jax import flops
from unihetero_jax.claims import Protocol, parse_protocol
from unihetero_jax.command_line import load_experiment, load_module, with_overrides
from unihetero_jax.config import Config, config_hash


@dataclasses.dataclass(frozen=True)
class Planned:
    """One run of a sweep."""

    arm: str
    config: Config

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.arm}-{self.config.seed}-{config_hash(self.config)}"

    @property
    def seeds(self) -> range:
        """One for each replicate."""
        return range(self.config.seed, self.config.seed + self.config.train.num_replicates)


def plan_file(flag: str) -> list[Planned]:
    """The runs of `--sweep=FILE[:scale]`.

    Raises:
        ValueError: the file has no BASE or no `sweep(scale)`, knows no such scale, or plans one run twice.
        ConfigError: an arm's fields are wrong; names the arm.
    """
    base, arms = _read_file(flag)
    values = load_experiment(base)
    return _checked([_planned(arm, values, overrides) for arm, overrides in arms(flag.partition(":")[2])], flag)


def base_of(flag: str) -> str:
    """The base experiment that a sweep file names."""
    return _read_file(flag)[0]


def protocol_of(flag: str, planned: Sequence[Planned]) -> Protocol | None:
    """The protocol of a sweep file, if it has one, with as many seeds as are planned.

    Raises:
        ValueError: there is no such file, or a field of the protocol is wrong.
    """
    values = getattr(_module_of(flag), "PROTOCOL", None)
    if values is None:
        return None
    return parse_protocol({**values, "num_seeds": len({seed for one in planned for seed in one.seeds})}, flag)


def _module_of(flag: str) -> Any:
    path = path_of(flag)
    if not path.is_file():
        raise ValueError(f"--sweep={flag}: no file {path}")
    return load_module(path)


def path_of(flag: str) -> Path:
    """The file that `--sweep=FILE[:scale]` names."""
    return Path(flag.partition(":")[0])


def _read_file(flag: str) -> tuple[str, Any]:
    path, module = path_of(flag), _module_of(flag)
    base, arms = getattr(module, "BASE", None), getattr(module, "sweep", None)
    if not isinstance(base, str) or not callable(arms):
        raise ValueError(f"--sweep={flag}: {path} needs BASE = 'experiments/x.py' and a function sweep(scale)")
    return base, arms


def plan_product(experiment: str, overrides: Sequence[str]) -> list[Planned]:
    """Every combination of the overrides' values: `a.b=x,y` has two. A field that is a tuple takes its commas itself.

    Raises:
        ValueError: nothing varies.
        ConfigError: a field is unknown, or a value of another type.
    """
    values, axes = load_experiment(experiment), []
    for override in overrides:
        path, _, text = override.partition("=")
        found: Any = values
        for part in path.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        is_list = isinstance(found, (tuple, list)) or "," not in text
        axes.append([override] if is_list else [f"{path}={one}" for one in text.split(",")])
    varying = [options for options in axes if len(options) > 1]
    if not varying:
        raise ValueError(
            "sweep: nothing varies; give a field several values, such as --config.seed=0,1,2, or --sweep=FILE"
        )
    planned = []
    for chosen in itertools.product(*axes):
        pairs = [one.partition("=") for one, options in zip(chosen, axes, strict=True) if len(options) > 1]
        arm = "-".join(f"{path.rpartition('.')[2]}={value}" for path, _, value in pairs if path != "seed")
        planned.append(Planned(arm or "run", with_overrides(values, chosen)))
    return _checked(planned, experiment)


def _planned(arm: str, values: Mapping[str, Any], overrides: Mapping[str, Any]) -> Planned:
    try:
        return Planned(arm, with_overrides(values, [f"{path}={text_of(value)}" for path, value in overrides.items()]))
    except ValueError as error:
        raise ValueError(f"arm {arm}: {error}") from error


def text_of(value: Any) -> str:
    """A value as a `--config.` flag has it."""
    if not isinstance(value, (tuple, list)):
        return str(value)
    return ",".join(f"({text_of(one)})" if isinstance(one, (tuple, list)) else str(one) for one in value)


def _checked(planned: list[Planned], flag: str) -> list[Planned]:
    if not planned:
        raise ValueError(f"{flag}: plans no run")
    twice = [name for name, number in Counter(one.name for one in planned).items() if number > 1]
    if twice:
        raise ValueError(f"{flag}: plans {', '.join(twice)} twice; give them different names, seeds or fields")
    of_seed = Counter((one.arm, seed) for one in planned for seed in one.seeds)
    if clash := [f"{arm}, seed {seed}" for (arm, seed), number in of_seed.items() if number > 1]:
        raise ValueError(f"{flag}: plans {clash[0]} twice; a table has one value for an arm and a seed")
    return planned


def run_flops(config: Config) -> float:
    """Model FLOPs of a whole run, on full rows."""
    work = flops.padded_work(config, config.train.global_batch_rows)
    return config.train.num_steps * config.train.num_replicates * flops.model_flops(config, work)["total"]


def trained_parameters(config: Config) -> float:
    """How many parameters the run trains."""
    counts = flops.parameter_counts(config.model, config.objective)
    return sum(count for name, count in counts.items() if name not in (*config.optimizer.frozen, "total"))


def flat_fields(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by their dotted paths."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat_fields(typing.cast(Mapping[str, Any], value), f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
