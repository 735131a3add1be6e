"""One frozen dataclass a service, filled from defaults, a TOML file and the environment.

    @dataclass(frozen=True)
    class Config:
        listen: str = setting("127.0.0.1:0", "Address to serve on.")

        def __post_init__(self) -> None:
            require(bool(self.listen), "listen must not be empty")

    config = load(Config, "index", path, os.environ)

The environment wins over the file, the file over the defaults. A field is set by
`SAMEPAGE_<SECTION>_<FIELD>` or by `field = value` in the file's table `[section]`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import os
import re
import textwrap
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from samepage.errors import InvalidArgumentError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Config = TypeVar("Config", bound=DataclassInstance)
else:
    Config = TypeVar("Config")

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})
# Kubernetes sets such variables for every Service that is called samepage-<section>.
_SERVICE_LINK = re.compile(r"(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)\w*)?)")


class ConfigError(InvalidArgumentError):
    """A setting is unknown, missing or wrong; the text says which and what it must be."""


def setting(default: Any, help: str, *, secret: bool = False) -> Any:
    """A field of a config class: its default, what it means (with unit), whether it is hidden
    when a config is printed."""
    return dataclasses.field(default=default, metadata={"help": help, "secret": secret})


def require(condition: bool, text: str) -> None:
    """Check a setting in `__post_init__`; `text` says what it must be.

    Raises:
        ConfigError: the condition does not hold.
    """
    if not condition:
        raise ConfigError(text)


def load(
    cls: type[Config],
    section: str,
    path: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Config:
    """Build a config of class `cls`.

    Args:
        section: the table of the file, and the middle of the variables' names.
        path: a TOML file; None for none. Tables of other sections are ignored.
        env: the environment; None for this process's own.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, a value is wrong.
    """
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    values: dict[str, Any] = {}
    if path is not None:
        for key, value in _read_table(path, section).items():
            where = f"{path}: [{section}] {key}"
            _check_known(key, names, where)
            values[key] = _from_toml(value, hints[key], where)
    for key, text in _from_environment(section, os.environ if env is None else env).items():
        where = f"environment variable SAMEPAGE_{section.upper()}_{key.upper()}"
        _check_known(key, names, where)
        values[key] = _from_text(text, hints[key], where)
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"[{section}] {error}") from error


def sample(cls: type[DataclassInstance], section: str) -> str:
    """A TOML file with every setting of `cls` at its default, commented out."""
    lines = [f"[{section}]"]
    for field in _own_first(cls):
        lines += ["", *(f"# {line}" for line in textwrap.wrap(field.metadata["help"], 98))]
        lines.append(f"# Environment: SAMEPAGE_{section.upper()}_{field.name.upper()}")
        lines.append(f"#{field.name} = {_toml(field.default)}")
    return "\n".join(lines) + "\n"


def render(config: DataclassInstance, section: str) -> str:
    """The settings in force as TOML, secrets hidden."""
    lines = [f"[{section}]"]
    for field in _own_first(type(config)):
        value = getattr(config, field.name)
        hidden = field.metadata["secret"] and value
        lines.append(f"{field.name} = {_toml('(hidden)' if hidden else value)}")
    return "\n".join(lines) + "\n"


def _own_first(cls: type[DataclassInstance]) -> list[dataclasses.Field[Any]]:
    """The settings, with those of base classes last."""
    own = inspect.get_annotations(cls)
    return sorted(dataclasses.fields(cls), key=lambda field: field.name not in own)


def _read_table(path: Path, section: str) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            table = tomllib.load(file).get(section, {})
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: {section} must be a table, written as [{section}]")
    return table


def _from_environment(section: str, env: Mapping[str, str]) -> dict[str, str]:
    prefix = f"SAMEPAGE_{section.upper()}_"
    found = {name[len(prefix) :]: text for name, text in env.items() if name.startswith(prefix)}
    return {name.lower(): text for name, text in found.items() if not _SERVICE_LINK.fullmatch(name)}


def _check_known(key: str, names: list[str], where: str) -> None:
    if key not in names:
        raise ConfigError(f"{where}: there is no such setting; there are {', '.join(names)}")


def _split_optional(hint: Any) -> tuple[Any, bool]:
    """The type without `| None`, and whether it was there."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
        return kinds[0], True
    return hint, False


def _from_toml(value: Any, hint: Any, where: str) -> Any:
    kind, _ = _split_optional(hint)
    if isinstance(value, str) and kind in (str, Path):
        return _from_text(value, hint, where)
    if kind is float and type(value) in (int, float):
        return float(value)
    if kind is not Path and type(value) is kind:
        return value
    raise ConfigError(f"{where}: {value!r} is not {_describe(kind)}")


def _from_text(text: str, hint: Any, where: str) -> Any:
    kind, optional = _split_optional(hint)
    if optional and not text:
        return None
    if kind is bool:
        if text.lower() in _TRUE | _FALSE:
            return text.lower() in _TRUE
    else:
        with contextlib.suppress(ValueError):
            return kind(text)
    raise ConfigError(f"{where}: {text!r} is not {_describe(kind)}")


def _describe(kind: type) -> str:
    return {
        str: "a string",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        Path: "a path",
    }[kind]


def _toml(value: object) -> str:
    if value is None:
        return '""'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    # A JSON string is a TOML basic string.
    return json.dumps(str(value), ensure_ascii=False)
