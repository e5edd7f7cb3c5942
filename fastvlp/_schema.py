"""Frozen dataclasses from plain mappings: every wrong key, type or value is named, with what is allowed.

Values are what JSON gives, or the texts of a YAML file or a command line: a text becomes what the annotation says, so that a name such as
010 stays a name.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says which key, what was got and what is allowed."""


def build(cls: type, values: Mapping[str, Any], path: str = "") -> Any:
    """An instance of the dataclass ``cls`` from nested mappings; fields that are not given keep their defaults.

    Args:
        path: dotted path of ``cls`` inside the whole configuration, for messages.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a value of the wrong type, or one that the dataclass refuses.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path or 'the configuration'} is {values!r}; a section with the keys {', '.join(keys(cls))} is needed")
    # Annotations are texts under ``from __future__ import annotations``; this resolves them.
    hints = typing.get_type_hints(cls)
    given = {}
    for key, value in values.items():
        if key not in keys(cls):
            raise ConfigError(unknown(str(key), keys(cls), path))
        given[key] = convert(hints[key], value, f"{path}.{key}" if path else key)
    missing = [field.name for field in dataclasses.fields(cls) if field.init and field.name not in given and required(field)]
    if missing:
        raise ConfigError(f"{path + '.' if path else ''}{missing[0]} is missing and has no default")
    try:
        return cls(**given)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {error}" if path else str(error)) from error


def keys(cls: type) -> list[str]:
    """Names of the fields that a configuration may set."""
    return [field.name for field in dataclasses.fields(cls) if field.init]


def required(field: dataclasses.Field) -> bool:
    """True when a field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def unknown(key: str, allowed: Sequence[str], path: str = "") -> str:
    """The sentence about a key that does not exist."""
    prefix = f"{path}." if path else ""
    near = difflib.get_close_matches(key, allowed, n=1, cutoff=0.6)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys{' of ' + path if path else ''}: {', '.join(allowed)}"
    return f"unknown key {prefix}{key}; {hint}"


def convert(hint: Any, value: Any, path: str) -> Any:
    """``value`` as the annotated type ``hint``: scalars, ``Literal``, unions, tuples, string-keyed mappings and dataclasses."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or (isinstance(hint, type) and dataclasses.is_dataclass(value) and isinstance(value, hint)):
        return value  # as it is, or already made
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and is_null(value):
            return None
        return _first_that_fits([argument for argument in arguments if argument is not type(None)], value, path, type(None) in arguments)
    if origin is typing.Literal:
        if value in arguments and not isinstance(value, bool):
            return value
        near = difflib.get_close_matches(str(value), [str(argument) for argument in arguments], n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"{path} is {value!r}; allowed: {', '.join(map(str, arguments))}{hint}")
    if origin is tuple:
        return _tuple(arguments, value, path)
    if origin in (list, Sequence):
        return _tuple((arguments[0], ...), value, path)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} is {value!r}; a mapping is needed, written {{name: value}}")
        return {str(key): convert(arguments[1], item, f"{path}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, path)
    return _scalar(hint, value, path)


def is_null(value: Any) -> bool:
    """Whether a value is, or is written as, nothing."""
    return value is None or value in ("null", "~", "None", "none")


def plain(value: Any) -> Any:
    """A text without an annotation as the number, truth value or nothing that it spells (YAML 1.2's core), in lists and mappings too."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if not isinstance(value, str):
        return value
    if value in ("true", "false"):
        return value == "true"
    if is_null(value):
        return None
    # int first: every whole number is a float too.
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _first_that_fits(hints: Sequence[Any], value: Any, path: str, none_too: bool) -> Any:
    errors = []
    for hint in hints:
        try:
            return convert(hint, value, path)
        except ConfigError as error:
            errors.append(str(error))
    # Of several refusals the one of the type that was most likely meant.
    best = errors[-1] if isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value) else errors[0]
    words = [word for hint in hints[1:] if typing.get_origin(hint) is typing.Literal for word in typing.get_args(hint)]
    raise ConfigError(best + "".join(f", or {word}" for word in words) + (" (or null)" if none_too else ""))


def _tuple(arguments: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if isinstance(value, str | int | float):
        value = [value]  # one entry may be written without brackets
    if not isinstance(value, Sequence):
        raise ConfigError(f"{path} is {value!r}; a list is needed, written [a, b]")
    if len(arguments) == 2 and arguments[1] is ...:
        return tuple(convert(arguments[0], item, f"{path}.{i}") for i, item in enumerate(value))
    if len(value) != len(arguments):
        raise ConfigError(f"{path} has {len(value)} entries; exactly {len(arguments)} are needed")
    return tuple(convert(hint, item, f"{path}.{i}") for i, (hint, item) in enumerate(zip(arguments, value, strict=True)))


def _scalar(hint: Any, value: Any, path: str) -> Any:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if hint is bool and (isinstance(value, bool) or value in ("true", "false")):
        return value is True or value == "true"
    if hint is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    if hint in (int, float) and not isinstance(value, bool):
        if hint is int and isinstance(value, str):
            try:
                return int(value)
            except ValueError:
                pass  # 1e3 is a whole number, too
        try:
            # YAML writes these with a dot, which Python's float does not read.
            number = float(value.replace(".nan", "nan").replace(".inf", "inf") if isinstance(value, str) else value)
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is not None and (hint is float or (math.isfinite(number) and number.is_integer())):
            # A whole number as it is, since a float rounds beyond 2^53.
            return value if hint is int and isinstance(value, int) else hint(number)
    raise ConfigError(f"{path} is {value!r}; {names.get(hint, getattr(hint, '__name__', str(hint)))} is needed")
