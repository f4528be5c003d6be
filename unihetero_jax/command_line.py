"""What stands on the command line: `--config=experiments/x.py[:arg]`, `--config.a.b=value`, and the flags of a command.

Values are typed by the field that they set, not by how they look: a run called `123` stays a string, `1e-3` becomes a
float, `encoder,projector` a tuple. All faults are reported together, before anything is loaded or compiled.
"""

import argparse
import ast
import copy
import dataclasses
import difflib
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from unihetero_jax.config import Config, ConfigError
from unihetero_jax.config_reading import from_config_dict

OVERRIDE_PREFIX = "--config."


def parse_config_flags(argv_config: str, overrides: Sequence[str]) -> Config:
    """The configuration that a command line asks for.

    Args:
        argv_config: value of `--config`: a Python file with `get_config`, and after a colon an argument for it.
        overrides: `--config.a.b=value` or `a.b=value`, applied in order.

    Raises:
        ValueError: if the file is missing or is no experiment.
        ConfigError: listing every unknown, ill-typed or contradictory field.
    """
    return with_overrides(load_experiment(argv_config), overrides)


def load_experiment(argv_config: str) -> dict[str, Any]:
    """Runs `get_config` of an experiment file and returns its fields as nested plain dicts.

    Raises:
        ValueError: naming the file and, where it does not exist, files with a similar name.
    """
    path_text, argument = _split_argument(argv_config)
    path = Path(path_text)
    if not path.is_file():
        raise ValueError(f"--config={argv_config}: no file {path}{_near_files(path)}")
    get_config = getattr(load_module(path), "get_config", None)
    if not callable(get_config):
        raise ValueError(f"--config={argv_config}: {path} defines no function get_config(arg='')")
    if argument and not inspect.signature(get_config).parameters:
        raise ValueError(f"--config={argv_config}: get_config of {path} takes no argument; write --config={path}")
    config = get_config(argument) if argument else get_config()
    if isinstance(config, ConfigDict):
        return config.to_dict()
    if isinstance(config, dict):
        return dict(config)
    found = type(config).__name__
    raise ValueError(f"--config={argv_config}: get_config of {path} returned {found}, expected a ConfigDict")


def with_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> Config:
    """Sets fields of a plain configuration and builds it; `values` stays as it is.

    A section of named entries (`data.sources`, `eval.benchmarks`) takes new names; an entry with fields of its own has
    to be given whole, but for those with a default.

    Raises:
        ConfigError: listing every fault of the overrides and of the resulting configuration.
    """
    values = copy.deepcopy(dict(values))
    faults: list[str] = []
    new_entries: dict[str, tuple[dict[str, Any], str, type]] = {}
    for override in overrides:
        _apply(values, override, faults, new_entries)
    for path, (section, name, entry_type) in new_entries.items():
        needed = [field.name for field in dataclasses.fields(entry_type) if field.default is dataclasses.MISSING]
        missing = [field for field in needed if field not in section[name]]
        if missing:
            known = [key for key in section if key != name]
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {path.rpartition('.')[0]}.{close[0]}?" if close else ""
            faults.append(f"{path}: no such entry{hint}; a new one also needs {', '.join(missing)}")
            del section[name]
    try:
        config = from_config_dict(values)
    except ConfigError as error:
        raise ConfigError(faults + error.faults) from None
    if faults:
        raise ConfigError(faults)
    return config


def parse_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parses a command's flags and collects the `--config.*` overrides, which may stand anywhere among them.

    Returns:
        The flags, and the overrides as `a.b=value` in order.

    Raises:
        ValueError: naming each unknown flag, with a spelling hint.
    """
    others, overrides = _split_overrides(arguments)
    namespace, unknown = parser.parse_known_args(others)
    flags = [option for action in _all_actions(parser, namespace) for option in action.option_strings]
    faults = []
    for text in unknown:
        name = text.split("=", 1)[0]
        if name.startswith("-"):
            close = difflib.get_close_matches(name, flags, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]}?" if close else f"; flags here: {', '.join(dict.fromkeys(flags))}"
            faults.append(f"{name}: unknown flag{hint}")
        else:
            faults.append(f"{text!r}: unexpected argument; flags are written --name=value")
    if faults:
        raise ValueError("\n".join(faults))
    return namespace, overrides


def _split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    others, overrides = [], []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith(OVERRIDE_PREFIX):
            others.append(argument)
            continue
        if "=" not in argument and remaining and not remaining[0].startswith("--"):
            argument = f"{argument}={remaining.pop(0)}"
        overrides.append(argument.removeprefix(OVERRIDE_PREFIX))
    return others, overrides


def _all_actions(parser: argparse.ArgumentParser, namespace: argparse.Namespace) -> list[argparse.Action]:
    """The parser's actions, and those of the sub-command that was chosen."""
    actions = []
    for action in parser._actions:
        actions.append(action)
        if isinstance(action, argparse._SubParsersAction):
            chosen = getattr(namespace, action.dest, None) if action.dest != argparse.SUPPRESS else None
            for name, sub_parser in action.choices.items():
                if chosen in (None, name):
                    actions.extend(_all_actions(sub_parser, namespace))
    return actions


def _split_argument(argv_config: str) -> tuple[str, str]:
    head, separator, argument = argv_config.partition(".py:")
    return (head + ".py", argument) if separator else (argv_config, "")


def _near_files(path: Path) -> str:
    """A hint: the files beside the missing one, or else the experiments."""
    folder = path.parent if path.parent.is_dir() else Path("experiments")
    names = sorted(file.name for file in folder.glob("*.py") if file.name != "__init__.py")
    if not names:
        return f"; {folder} holds no experiment"
    if path.name + ".py" in names:
        return f"; did you mean {folder / path.name}.py?"
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    files = [str(folder / name) for name in close or names]
    return f"; did you mean {' or '.join(files)}?" if close else f"; there are {', '.join(files)}"


def load_module(path: Path) -> types.ModuleType:
    """Runs an experiment or sweep file.

    Raises:
        ValueError: it is no Python file, or cannot be loaded.
    """
    name = f"experiment_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--config={path}: not a Python file; name one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as error:
        raise ValueError(f"--config={path}: the file cannot be loaded: {error}") from error
    return module


def _apply(
    values: dict[str, Any],
    override: str,
    faults: list[str],
    new_entries: dict[str, tuple[dict[str, Any], str, type]],
) -> None:
    """Sets one field in `values`, walking down the types of the configuration beside the values."""
    path, separator, text = override.removeprefix(OVERRIDE_PREFIX).partition("=")
    if not separator:
        faults.append(f"{path}: an override needs a value: {OVERRIDE_PREFIX}{path}=value")
        return
    names = path.split(".")
    section, hint = values, Config
    for depth, name in enumerate(names):
        known, hint = _member(hint, name)
        if hint is None:
            faults.append(f"{path}: unknown field{_unknown_hint(names, depth, known)}")
            return
        if depth == len(names) - 1:
            section[name] = _parse_value(hint, text)
            return
        if name not in section:
            section[name] = {}
            if not known and dataclasses.is_dataclass(hint):
                new_entries[".".join(names[: depth + 1])] = (section, name, typing.cast(type, hint))
        section = section[name]
        if not isinstance(section, dict):
            faults.append(f"{path}: {'.'.join(names[: depth + 1])} is no section")
            return


def _member(hint: Any, name: str) -> tuple[list[str], Any]:
    """The names that a section of this type has, and the type of one of them; None where there is none."""
    if dataclasses.is_dataclass(hint):
        fields = typing.get_type_hints(hint)
        return list(fields), fields.get(name)
    origin = typing.get_origin(hint)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return [], typing.get_args(hint)[1]
    return [], None


def _parse_value(hint: Any, text: str) -> Any:
    """The value that `text` means for a field of this type; what it cannot mean, `from_config_dict` refuses."""
    is_text = hint is str or (
        typing.get_origin(hint) is typing.Literal and all(isinstance(choice, str) for choice in typing.get_args(hint))
    )
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False}.get(text, text) if hint is bool else text
    return text if is_text and not isinstance(value, str) else value


def _unknown_hint(names: Sequence[str], depth: int, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(names[depth], known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {'.'.join([*names[:depth], close[0], *names[depth + 1 :]])}?"
    return f"; fields here: {', '.join(known)}"
