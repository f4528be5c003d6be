"""From a ConfigDict to the frozen dataclasses of a run and back, with every fault of it named at once."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

from unihetero_jax.config import Config, ConfigError
from unihetero_jax.config_rules import validate


def from_config_dict(config_dict: ConfigDict | Mapping[str, Any]) -> Config:
    """Builds and validates the configuration.

    Raises:
        ConfigError: listing every unknown, missing or ill-typed field with its dotted path, or every invalid
            combination.
    """
    faults: list[str] = []
    values = config_dict.to_dict() if isinstance(config_dict, ConfigDict) else config_dict
    config = _build(Config, values, "", faults)
    if faults:
        raise ConfigError(faults)
    faults = validate(config)
    if faults:
        raise ConfigError(faults)
    return config


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Dotted paths where two plain configurations differ, as `path: old -> new`."""
    a, b = _flatten(old), _flatten(new)
    missing = "(absent)"
    return [
        f"{key}: {a.get(key, missing)!r} -> {b.get(key, missing)!r}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key, missing) != b.get(key, missing)
    ]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(_flatten(value, path + "."))
        else:
            flat[path] = value
    return flat


def _build(cls: type, values: Any, path: str, faults: list[str]) -> Any:
    if not isinstance(values, Mapping):
        faults.append(f"{path or 'config'}: expected a section, got {values!r}")
        return None
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
            hint = f"; did you mean {_join(path, close[0])}?" if close else f"; fields here: {', '.join(hints)}"
            faults.append(f"{_join(path, key)}: unknown field{hint}")
    built = {}
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    for name, hint in hints.items():
        if name not in values and defaults[name] is not dataclasses.MISSING:
            built[name] = defaults[name]
            continue
        if name not in values:
            faults.append(f"{_join(path, name)}: missing (defaults are in experiments/base.py)")
            continue
        built[name] = _convert(hint, values[name], _join(path, name), faults)
    return cls(**built) if len(built) == len(hints) else None


def _convert(hint: Any, value: Any, path: str, faults: list[str]) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, path, faults)
    if origin is Literal:
        return _one_of(arguments, value, path, faults)
    if origin is tuple:
        if isinstance(value, str):
            value = tuple(part for part in value.split(",") if part)
        if not isinstance(value, list | tuple):
            faults.append(f"{path}: expected a list, got {value!r}")
            return ()
        return tuple(_convert(arguments[0], item, f"{path}[{i}]", faults) for i, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            faults.append(f"{path}: expected a section of named entries, got {value!r}")
            return {}
        entries = {key: _convert(arguments[1], item, _join(path, key), faults) for key, item in value.items()}
        return types.MappingProxyType(entries)
    return _scalar(hint, value, path, faults)


def _one_of(choices: tuple[Any, ...], value: Any, path: str, faults: list[str]) -> Any:
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        faults.append(f"{path}: {value!r} is none of {', '.join(map(repr, choices))}{hint}")
    return value


def _scalar(hint: type, value: Any, path: str, faults: list[str]) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        faults.append(f"{path}: expected {hint.__name__}, got {value!r} ({type(value).__name__})")
    elif hint is float and not math.isfinite(value):
        faults.append(f"{path}: {value!r} is not a finite number")
    return value


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
