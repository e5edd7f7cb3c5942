"""Recipes by name, changed by dotted keys, as plain values and back.

    recipe = load("clip", ["run.name=first", "optim.lr=1e-3", "model.image.width=256"])

A recipe is a Python function that returns a ``Recipe``: ``recipe()``, ``paper()`` or another one in a file of ``fastvlp.systems`` or of
one's own. Its ``model`` is a ``fiddle.Config``: a constructor call that is not made yet. A YAML file is a list of changes on a recipe.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import fiddle as fdl
from torch import nn

from fastvlp._schema import ConfigError, build, convert, keys, plain, unknown
from fastvlp.data.fields import Field
from fastvlp.recipe import LENGTHS, NO_DATA, Recipe

DEFAULT = "clip"
ALIASES = {"mini": "clip"}  # the name of the default recipe before there were systems
_own_files: set[str] = set()  # modules of recipe files that were named on the command line


def names() -> list[str]:
    """The systems that ship with a recipe."""
    import fastvlp.systems as systems

    return sorted(module.name for module in pkgutil.iter_modules(systems.__path__)
                  if module.name != "system" and hasattr(importlib.import_module(f"fastvlp.systems.{module.name}"), "recipe"))


def load(recipe: str | None = None, changes: Sequence[str] = ()) -> Recipe:
    """A recipe with changes.

    Args:
        recipe: NAME, NAME:FUNCTION, FILE.py, FILE.py:FUNCTION (the function is ``recipe`` where it is not named), or a YAML file: changes
            on the recipe that its key ``recipe`` names (the default one without). None is the default recipe, on the data that ships.
        changes: such as "optim.lr=1e-3" or "schedule.stages.0.keep=0.5"; lists are written [a, b], mappings {a: b}.

    Raises:
        ConfigError: for a recipe that does not exist, a file that does not import, or a key or value that is not allowed.
    """
    if recipe is None:
        _refuse_own_data(line.partition("=")[0] for line in changes)
        recipe = DEFAULT
    if Path(recipe).suffix in (".yaml", ".yml"):
        return _from_yaml(Path(recipe), changes)
    make = function(recipe)
    try:
        made = make()
    except Exception as error:  # as when a file is imported, anything may happen
        raise ConfigError(f"recipe {recipe} fails: {raised(error)}") from error
    if not isinstance(made, Recipe):
        raise ConfigError(f"{recipe} returns {type(made).__name__}; a recipe returns fastvlp.recipe.Recipe(model=..., schedule=..., ...)")
    if made.run.name == "run":
        name = recipe.removesuffix(":recipe").replace("/", "-").replace(":", "-").replace(".py", "").strip("-.")
        made = dataclasses.replace(made, run=dataclasses.replace(made.run, name=name))
    return change(made, changes) if changes else from_dict(to_dict(made))  # what a function set is checked as what a user sets


def change(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    """A copy of a recipe with ``key=value`` changes."""
    if not changes:
        return recipe
    # By way of plain values, so that what was changed is checked as a whole recipe is.
    values = to_dict(recipe)
    for line in changes:
        key, separator, text = line.partition("=")
        if not separator or not key:
            raise ConfigError(f"{line!r} is no change; write key=value, for example optim.lr=1e-3")
        key = _whole(key, text)
        _check_section(key, values)
        values = _set(values, key.split("."), _value(text, line), key)
        section, _, length = key.partition(".")
        if section == "schedule" and length in LENGTHS and text != "null":  # whichever is given counts
            for other in LENGTHS:
                if other != length and not any(line.startswith(f"schedule.{other}=") for line in changes):
                    values["schedule"] = {**values["schedule"], other: None}
    return from_dict(values)


def function(recipe: str) -> Callable[[], Recipe]:
    """The function that a name such as ``coca:paper``, ``clip-vit-b-32`` or ``mine.py:small`` stands for."""
    if recipe in (own := variants()):
        return own[recipe]
    place, _, name = recipe.rpartition(":") if ":" in recipe else (recipe, "", "recipe")
    module = _file(Path(place)) if place.endswith(".py") else _system(place)
    name = name or "recipe"
    made = getattr(module, name, None)
    if not callable(made):
        known = ", ".join(_functions(module))
        raise ConfigError(f"{place} has no recipe {name}; it has {known or 'none: write def recipe() -> Recipe'}")
    return typing.cast(Callable[[], Recipe], made)


def variants() -> dict[str, Callable[[], Recipe]]:
    """The recipes that a system's file has beside ``recipe`` and ``paper``, by name, such as clip-vit-b-32."""
    found = {}
    for system in names():
        module = importlib.import_module(f"fastvlp.systems.{system}")
        for name in _functions(module):
            # By what it says to return: helpers of a file may take no arguments either.
            if name not in ("recipe", "paper") and vars(module)[name].__annotations__.get("return") == "Recipe":
                found[f"{system}-{name}".replace("_", "-")] = vars(module)[name]
    return found


def for_own_data() -> dict[str, Callable[[], Recipe]]:
    """Of the variants, those that leave their data to name."""
    return {name: recipe for name, recipe in variants().items() if recipe().data.train == NO_DATA}


def _refuse_own_data(named: Iterable[str]) -> None:
    """The default recipe is a toy for the data that ships: 64 pixels, and a tokenizer of emoji names."""
    if any(key == "data" or key == "data.train" or key.startswith("data.train.") for key in named):
        raise ConfigError(f"data is named and no recipe is; say which model is trained on it: {', '.join(for_own_data())}, or another that "
                          "fastvlp recipes lists")


def _functions(module: ModuleType) -> list[str]:
    # Its own alone, or whatever the file imports would count as its recipes.
    return [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__ and not n.startswith("_")
            and not inspect.signature(f).parameters]


def _system(name: str) -> ModuleType:
    known = names()
    name = ALIASES.get(name, name).replace("-", "_")
    if name in known:
        return importlib.import_module(f"fastvlp.systems.{name}")
    near = difflib.get_close_matches(name.replace("_", "-"), variants(), n=1) or difflib.get_close_matches(name, [*known, *ALIASES], n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}, or the path of a Python or YAML file"
    raise ConfigError(f"unknown recipe {name}; {hint}")


def _file(path: Path) -> ModuleType:
    """A recipe file as a module of the name of the file, so that checkpoints can name its classes."""
    if not path.is_file():
        raise ConfigError(f"recipe {path}: there is no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Before it runs: dataclasses look up their module while they are made.
    sys.modules[path.stem] = module
    _own_files.add(path.stem)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # anything may happen in a stranger's file; it must be one sentence
        said = raised(error)
        # Half a module must not be found by the next import.
        del sys.modules[path.stem]
        _own_files.discard(path.stem)
        raise ConfigError(f"recipe {path} does not import: {said}") from error
    return module


def raised(error: BaseException) -> str:
    """An error of a recipe file's code in one line, with the place in that file: "NameError: name 'x' is not defined (mine.py, line 7)"."""
    files = {getattr(sys.modules.get(name), "__file__", None) for name in _own_files}
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    where = f" ({Path(places[-1].filename).name}, line {places[-1].lineno})" if places else ""
    said = str(error).partition("\n\nFiddle context:")[0]  # the whole call, with every module in it
    return f"{type(error).__name__}: {' '.join(said.split())}{where}"


def _from_yaml(path: Path, changes: Sequence[str]) -> Recipe:
    if not path.is_file():
        raise ConfigError(f"recipe {path}: there is no such file")
    values = _yaml(path.read_text(encoding="utf-8"), str(path)) or {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} holds no sections; it needs keys such as {', '.join(keys(Recipe))}")
    values = dict(values)
    recipe = values.pop("recipe", None)
    if recipe is None and "model" not in values:
        _refuse_own_data(key for key, _ in _sections(values))
    merged = to_dict(load(recipe))
    merged["run"]["name"] = path.stem
    for key, value in _sections(values):
        key = _whole(key, value)
        _check_section(key, merged)
        merged = _set(merged, key.split("."), value, key)
    return change(from_dict(merged), changes)


def _sections(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The changes that a YAML file means: sections merge, what is inside them is replaced; a model that says what makes it is whole."""
    for section, inside in values.items():
        if isinstance(inside, Mapping) and inside and "make" not in inside:
            yield from ((f"{section}.{key}", value) for key, value in inside.items())
        else:
            yield str(section), inside


def _value(text: str, line: str) -> Any:
    """What stands behind the = of a change: a list, a mapping, or the text as it was typed (010, 1:30, *.tar, {00..01}.tar, [ab].tar)."""
    close = {"[": "]", "{": "}", '"': '"', "'": "'"}.get(text[:1])
    if close is None or re.match(r"\{\d+\.\.", text) or (close in text[1:] and not text.rstrip().endswith(close)):
        return text
    return _yaml(text, line)


def _yaml(text: str, source: str) -> Any:
    """YAML whose scalars stay texts: what they mean is for the annotation of their key to say."""
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ConfigError("recipes need PyYAML, which is not installed: pip install 'fastvlp[train]'") from error
    try:
        return yaml.load(text, yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not YAML: {' '.join(str(error).split())}") from error


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Nested dicts and lists that YAML and JSON can hold; calls that are not made yet are {"make": "module:name", ...}."""
    return typing.cast(dict[str, Any], {field.name: _plain(getattr(recipe, field.name)) for field in dataclasses.fields(recipe)})


def _plain(value: Any, named: bool = False) -> Any:
    if isinstance(value, fdl.Buildable):
        make, arguments = fdl.get_callable(value), value.__arguments__
        return {"make": f"{make.__module__}:{make.__qualname__}", **{name: _plain(item, True) for name, item in arguments.items()}}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        # Classes that the annotation does not tell have to be named, or ``from_dict`` could not make them again.
        named = named or isinstance(value, Field) or kind.__module__ in _own_files
        head = {"make": f"{kind.__module__}:{kind.__qualname__}"} if named else {}
        return {**head, **{field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item, named) for item in value] if isinstance(value, list | tuple) else value


def from_dict(values: Mapping[str, Any]) -> Recipe:
    """The recipe that nested mappings describe; the inverse of ``to_dict``."""
    rest = {key: value for key, value in values.items() if key != "model"}
    model = spec(values.get("model"), "model")
    data = rest.get("data")
    if isinstance(data, Mapping) and isinstance(data.get("fields"), Mapping):
        rest["data"] = {**data, "fields": {name: _field(value, f"data.fields.{name}") for name, value in data["fields"].items()}}
        sources = rest["data"].get("train")
        if isinstance(sources, list) and any(isinstance(one, Mapping) for one in sources):
            rest["data"]["train"] = [_source(one, f"data.train.{i}") for i, one in enumerate(sources)]
    made: Recipe = build(Recipe, {"model": model, **rest})
    return made


def _source(values: Any, path: str) -> Any:
    if isinstance(values, Mapping) and isinstance(values.get("fields"), Mapping):
        return {**values, "fields": {name: _field(value, f"{path}.fields.{name}") for name, value in values["fields"].items()}}
    return values


def _field(values: Any, path: str) -> Any:
    """A field of a batch: a small dataclass of ``fastvlp.data.fields`` or of the recipe's own file."""
    if not isinstance(values, Mapping) or "make" not in values:
        raise ConfigError(f"{path} is {values!r}; a field is needed, written {{make: 'fastvlp.data.fields:Image', ...}}")
    kind = _find(values["make"], path, ("fastvlp.data.fields",))
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise ConfigError(f"{path}: {values['make']} is no field")
    inside = {key: _field(value, f"{path}.{key}") if isinstance(value, Mapping) and "make" in value else value
              for key, value in values.items() if key != "make"}
    return build(kind, inside, path)


def spec(values: Any, path: str) -> fdl.Config:
    """The constructor call that a mapping with the key ``make`` describes, typed by the signature.

    Only modules of ``fastvlp.systems``, ``towers`` and ``layers``, of ``torch.nn`` and of recipe files named on the command line can be
    made, since the mapping may come from a stranger's model.json.
    """
    if not isinstance(values, Mapping) or "make" not in values:
        raise ConfigError(f"{path} is {values!r}; a call is needed, written {{make: 'fastvlp.systems.clip:Clip', ...}}")
    make = _find(values["make"], path, ("fastvlp.systems", "fastvlp.towers", "fastvlp.layers", "torch.nn"))
    # A recipe file may come from a stranger: it may make modules, and may not call whatever can be imported.
    if not (isinstance(make, type) and issubclass(make, nn.Module)) and not getattr(make, "makes_module", False):
        raise ConfigError(f"{path}: {values['make']} makes no module")
    # By the signature and the annotations, so that a class of the user's own is checked as those that ship are.
    signature = inspect.signature(make)
    hints = typing.get_type_hints(inspect.getattr_static(make, "__init__") if isinstance(make, type) else make)
    arguments = {}
    for name, value in values.items():
        if name == "make":
            continue
        if name not in signature.parameters:
            raise ConfigError(unknown(str(name), list(signature.parameters), path))
        arguments[name] = _argument(hints.get(name, Any), value, f"{path}.{name}")
    return fdl.Config(make, **arguments)


def _argument(hint: Any, value: Any, path: str) -> Any:
    if isinstance(value, Mapping) and "make" in value:
        return spec(value, path)
    if isinstance(value, Mapping) and any(isinstance(item, Mapping) and "make" in item for item in value.values()):
        return {name: _argument(Any, item, f"{path}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple) and any(isinstance(item, Mapping) and "make" in item for item in value):
        return [_argument(Any, item, f"{path}.{i}") for i, item in enumerate(value)]
    if isinstance(hint, type) and issubclass(hint, nn.Module):
        raise ConfigError(f"{path} is {value!r}; a call that makes a {hint.__name__} is needed, written {{make: 'module:name', ...}}")
    # Without an annotation the text alone says what is meant.
    return plain(value) if hint is Any else convert(hint, value, path)


def _find(make: Any, path: str, packages: Sequence[str]) -> Any:
    module, _, name = str(make).partition(":")
    # Before anything is imported, since an import runs code.
    if not any(module == package or module.startswith(f"{package}.") for package in packages) and module not in _own_files:
        raise ConfigError(f"{path}: {make} is outside of {', '.join(packages)}; name the file that it is from: fastvlp train FILE.py, "
                          "fastvlp eval or show --recipe FILE.py, fastvlp.load(..., recipe='FILE.py')")
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{path}: there is no {make}") from error
    return found


def differences(one: Recipe, other: Recipe) -> list[str]:
    """Dotted keys whose values differ, as "key: one -> other"."""
    left, right = dict(_leaves(to_dict(one))), dict(_leaves(to_dict(other)))
    return [f"{key}: {left.get(key)} -> {right.get(key)}" for key in {**left, **right} if left.get(key) != right.get(key)]


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) and value else enumerate(value) if isinstance(value, list) and value else None
    if items is None:
        yield path, value
        return
    for key, item in items:
        yield from _leaves(item, f"{path}.{key}" if path else str(key))


def _set(values: Any, path: list[str], new: Any, key: str) -> Any:
    """``values`` with one nested entry changed; lists are entered by number, a list's end may be extended by one.

    A mapping that replaces a call makes the same thing unless it says otherwise.
    """
    if not path:
        return {"make": values["make"], **new} if isinstance(new, Mapping) and isinstance(values, Mapping) and "make" in values else new
    if isinstance(values, list):
        if not path[0].isdigit() or int(path[0]) > len(values):
            raise ConfigError(f"{key}: {path[0]} is no place in a list of {len(values)}; 0 to {len(values)} are allowed")
        index = int(path[0])
        old = values[index] if index < len(values) else {}
        return [*values[:index], _set(old, path[1:], new, key), *values[index + 1:]]
    if values is not None and not isinstance(values, Mapping):
        raise ConfigError(f"{key}: there is a value above {path[0]}, not a section")
    # A copy: what was given stays as it was.
    values = dict(values or {})
    values[path[0]] = _set(values.get(path[0]), path[1:], new, key)
    return values


def _whole(key: str, value: Any) -> str:
    """The key that a short one stands for: ``data`` (shards) and the lengths of training."""
    if key == "data" and not isinstance(value, Mapping) and not str(value).startswith("{make"):
        return "data.train"
    return f"schedule.{key}" if key in LENGTHS else key


def _check_section(key: str, values: Mapping[str, Any]) -> None:
    """Refuse a key of no section; suggests across sections, so that ``lr`` finds ``optim.lr``."""
    section = key.partition(".")[0]
    if section in keys(Recipe):
        return
    known = [path for path, _ in _leaves(dict(values))]
    # The same last name first: whoever writes ``lr`` means ``optim.lr``, however far that is in letters.
    same_name = [path for path in known if path.rpartition(".")[2] == key.rpartition(".")[2]]
    near = same_name or difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    if near:
        raise ConfigError(f"unknown key {key}; did you mean {' or '.join(near[:3])}?")
    raise ConfigError(unknown(section, keys(Recipe)))


def dump(recipe: Recipe) -> str:
    """The whole recipe as YAML."""
    import yaml

    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True)
