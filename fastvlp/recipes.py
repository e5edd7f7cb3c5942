"""The recipes that ship: small YAML files whose first comment lines say what they reproduce and the command that runs them."""

from __future__ import annotations

import difflib
from pathlib import Path

from fastvlp._schema import ConfigError

DEFAULT_RECIPE = "mini"
FOLDER = Path(__file__).parent / "configs"


def recipe_names() -> list[str]:
    """Names of the recipes in fastvlp/configs."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def recipe_path(recipe: str) -> Path:
    """The file of a recipe given by name or path.

    Raises:
        ConfigError: there is no such recipe; the message names the nearest one.
    """
    if recipe in recipe_names():
        return FOLDER / f"{recipe}.yaml"
    path = Path(recipe)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or "/" in recipe:
        raise ConfigError(f"recipe {recipe}: there is no such file")
    near = difflib.get_close_matches(recipe, recipe_names(), n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(recipe_names())}, or the path of a YAML file"
    raise ConfigError(f"unknown recipe {recipe}; {hint}")


def summary(recipe: str) -> str:
    """The first comment lines of a recipe: what it reproduces, and the command."""
    lines = []
    for line in recipe_path(recipe).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    return "\n".join(lines)
