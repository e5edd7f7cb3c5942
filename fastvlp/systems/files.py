"""Systems from recipes, and as folders that ``fastvlp.load`` reads: weights, what they belong to, the tokenizer."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fiddle as fdl
import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from fastvlp._schema import ConfigError
from fastvlp.config import from_dict, function, raised, to_dict
from fastvlp.data.fields import bind as bind_fields
from fastvlp.data.tokenizer import load_tokenizer
from fastvlp.recipe import Recipe
from fastvlp.systems.state_folder import metadata_of, read_state
from fastvlp.systems.system import System

LARGEST, DEEPEST = 1 << 24, 1 << 10  # number, and number of layers, in a description
WEIGHTS, DESCRIPTION, TOKENIZER = "model.safetensors", "model.json", "tokenizer.json"
# Parts that are whole systems, and how names in such a system begin: a teacher may be any, a language model is a captioner.
HELD = {"teacher": "", "lm": "joint."}


def build_system(recipe: Recipe, tokenizer: str | os.PathLike[str] | None = None) -> System:
    """The system of a recipe with fresh weights from torch's generator, its tokenizer, and its fields bound to both.

    Raises:
        ConfigError: something in it refuses its arguments, or the tokenizer does not fit a text tower.
    """
    try:
        system = fdl.build(recipe.model)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model: {str(error).splitlines()[0]}") from error
    except Exception as error:  # a constructor of a recipe file may raise anything
        raise ConfigError(f"model cannot be made: {raised(error)}") from error
    if not isinstance(system, System):
        raise ConfigError(f"model makes a {type(system).__name__}; a fastvlp.systems.System is needed")
    if type(system).encode is System.encode:
        raise ConfigError(f"{type(system).__name__} has no encode; write encode(self, batch), which gives what some samples are alone")
    try:
        system.tokenizer = load_tokenizer(tokenizer or recipe.data.tokenizer)
    except (ImportError, ValueError, FileNotFoundError) as error:
        raise ConfigError(f"data.tokenizer: {error}") from error
    system.fields = bind(recipe.data.fields, system)
    return system


def bind(fields: Mapping[str, Any], system: System) -> dict[str, Any]:
    """Fields with what they left open filled in from the system and its tokenizer."""
    try:
        return dict(bind_fields(fields, system, system.tokenizer))
    except ValueError as error:
        raise ConfigError(f"data.fields: {error}") from error


def save(folder: str | os.PathLike[str], system: System, recipe: Recipe, state: dict[str, Tensor] | None = None) -> None:
    """Write model.safetensors, model.json and tokenizer.json.

    Args:
        state: whole tensors on the CPU; None: those of ``system``.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = system.state_dict() if state is None else state
    # Copies, since safetensors refuses tensors that share memory, as tied weights do.
    save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}, str(folder / WEIGHTS))
    values = to_dict(recipe)
    described = {"model": values["model"], "data": {"fields": values["data"]["fields"]}}
    (folder / DESCRIPTION).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    if system.tokenizer is not None:
        system.tokenizer.save(folder / TOKENIZER)
    for path in folder.iterdir():
        path.chmod(0o666 & ~_umask())  # safetensors writes for the owner alone


def _umask() -> int:
    # Python reads a umask only by setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu", recipe: str | os.PathLike[str] | None = None) -> System:
    """A system that ``save`` or a training run wrote, in evaluation mode.

    Args:
        path: a run, one of its checkpoints (then with the averaged weights where there are any), or a folder with model.safetensors and
            model.json.
        recipe: the Python file that a system of one's own is from (``mine.py``). Its code runs; nothing that ``path`` holds does.

    Raises:
        FileNotFoundError: there is no model in the folder.
        ValueError: the description cannot be used, or the weights do not belong to it.
    """
    if recipe is not None:
        function(os.fspath(recipe))
    folder = Path(path)
    if (folder / "model" / DESCRIPTION).is_file():
        folder = folder / "model"
    if (folder / "trainer.json").is_file():
        return _from_checkpoint(folder).to(device).eval()
    for name in (DESCRIPTION, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}; pass the folder of a finished run, or one that systems.files.save wrote")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    described = _json(folder / DESCRIPTION, ("model", "data"))
    system = _described(folder / DESCRIPTION, described, folder / TOKENIZER if (folder / TOKENIZER).is_file() else None,
                        (folder / WEIGHTS).stat().st_size)
    try:
        system.load_state_dict(load_file(str(folder / WEIGHTS)))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS} does not fit {folder / DESCRIPTION}: {' '.join(str(error).split())[:500]}") from error
    return system.to(device).eval()


def _json(file: Path, keys: Sequence[str]) -> Any:
    """What a description holds, of which no more than these ``keys`` is allowed.

    Raises:
        ValueError: it is no such description.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{file} is no description of a model: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is no description of a model: it is no JSON object")
    for key in found:
        if key not in keys:
            raise ValueError(f"{file}: unknown key {key!r}; a description has {', '.join(keys)}")
    return found


def _described(file: Path, described: Any, tokenizer: Path | None, room: int) -> System:
    """The system that a stranger's file describes, with fresh weights, unless it has more of them than ``room`` bytes of weights can be."""
    try:
        _bounded(described["model"], str(file))
        recipe = from_dict({"schedule": {"steps": 1}, "model": described["model"],
                            "data": {key: described["data"][key] for key in ("fields", "tokenizer") if key in described["data"]}})
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is no description of a model: {type(error).__name__} {error}") from error
    # Counted before anything is allocated: a hostile description of a few bytes could ask for all the memory there is.
    with contextlib.suppress(NotImplementedError), torch.device("meta"):  # a part that reads its own weights needs a real device
        try:
            size = sum(parameter.numel() for parameter in fdl.build(recipe.model).parameters())
        except (ValueError, TypeError):
            size = 0  # it is refused below, with its reason
        except RuntimeError as error:
            if "meta tensors" in str(error):  # a part computes where it is made
                raise NotImplementedError from error
            raise ValueError(f"{file} asks for a model that cannot be: {str(error).splitlines()[0]}") from error
        # Weights against bytes is a generous bound, since no weight takes less than one byte.
        if size > room:
            raise ValueError(f"{file} asks for {size:,} weights, and there are {room:,} bytes of them")
    return build_system(recipe, tokenizer)


def _bounded(values: Any, where: str) -> None:
    """Refuse numbers that no model has, before a model of such a size is made."""
    items = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        # A depth multiplies whole blocks, and so has a bound of its own.
        most = DEEPEST if key in ("depth", "layers") else LARGEST
        if isinstance(value, int | float) and abs(value) > most:
            raise ValueError(f"{where}: {key} is {value}; it is at most {most:,}")
        _bounded(value, where)


def _from_checkpoint(folder: Path) -> System:
    """The weights of a training checkpoint, whole or written in shards."""
    described = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
    room = sum(file.stat().st_size for file in (folder / "state").iterdir())
    system = _described(folder / "trainer.json", described.get("recipe") if isinstance(described, dict) else None, None, room)
    state: dict[str, Any] = {"model": system.state_dict()}
    names = metadata_of(folder / "state").state_dict_metadata
    averaged = [key.removeprefix("ema.") for key in names if key.startswith("ema.")]
    if averaged:
        state["ema"] = {name: torch.empty_like(state["model"][name]) for name in averaged}
    try:
        read_state(state, folder / "state", alone=True)
    except CheckpointException as error:
        raise ValueError(f"{folder} does not fit its own description: {' '.join(str(error).split())[-300:]}") from error
    # Averages of weights are what training wrote them for, so they win.
    system.load_state_dict({**state["model"], **state.get("ema", {})})
    return system


def take_weights(system: System, start: str | os.PathLike[str] | Mapping[str, str]) -> str:
    """Take the weights of other runs or model folders as far as names and shapes fit; returns a sentence that says what was taken.

    Args:
        start: a folder for the whole system; what that holds may be the system's ``teacher`` or ``lm`` (see ``HELD``). Or folders by part
            ({"image": "runs/clip", "lm": "runs/simvlm"}): each takes the part of that name, or else all of what is there.

    Raises:
        ConfigError: nothing in a folder fits, it holds no such model, or there is no such part.
    """
    mine, taken, said = system.state_dict(), dict[str, Tensor](), []
    for part, place in start.items() if isinstance(start, Mapping) else [("", start)]:
        own = [name for name in mine if not part or name.startswith(f"{part}.")]
        if not own:
            parts = ", ".join(sorted({name.partition(".")[0] for name in mine}))
            raise ConfigError(f"run.start names {part}, which is no part of this model with weights; its parts are {parts}")
        folder, weights = _weights_of(place)
        theirs = weights if part else system.weights_from(weights)
        held = part or _held(mine, theirs)
        if not any(name.startswith(f"{held}.") for name in theirs):
            theirs = {f"{held}.{name}" if held else name: tensor for name, tensor in theirs.items()}
        elif part:
            theirs = {name: tensor for name, tensor in theirs.items() if name.startswith(f"{part}.")}
        # A layer with an adapter keeps its weights one level down, which a run without adapters does not know.
        named = {name.replace(".base_layer.", "."): name for name in own}
        found = {named[name]: tensor for name, tensor in theirs.items() if name in named and mine[named[name]].shape == tensor.shape}
        if not found:
            raise ConfigError(f"run.start: nothing in {folder / WEIGHTS} has the name and the shape of a part of this model")
        left = sorted({name.removeprefix(f"{held}.").partition(".")[0] for name in theirs if named.get(name) not in found})
        said.append(f"took {len(found)} of {len(own)} tensors{' of ' + part if part else ''} from {folder}"
                    + (f"; not used of theirs: {', '.join(left)}" if left else ""))
        taken |= found
    # Not strict: what found nothing keeps its fresh weights, which the sentence below says.
    system.load_state_dict(taken, strict=False)
    fresh = sorted({name.partition(".")[0] for name in mine if name not in taken})
    return "; ".join([*said, *([f"fresh in {', '.join(fresh)}"] if fresh else [])])


def _weights_of(place: str | os.PathLike[str]) -> tuple[Path, Mapping[str, Tensor]]:
    from safetensors.torch import load_file

    folder = Path(place)
    folder = folder / "model" if (folder / "model" / WEIGHTS).is_file() else folder
    if not (folder / WEIGHTS).is_file():
        raise ConfigError(f"run.start: {folder} holds no {WEIGHTS}; name a finished run or a model folder")
    return folder, load_file(str(folder / WEIGHTS))


def _held(mine: Iterable[str], theirs: Iterable[str]) -> str:
    """The part that stands for another system's whole, as far as names say; "" where there is none, or where they have it, too."""
    for part, inside in HELD.items():
        if any(name.startswith(f"{part}.{inside}") for name in mine) and any(name.startswith(inside) for name in theirs) \
                and not any(name.startswith(f"{part}.") for name in theirs):
            return part
    return ""
