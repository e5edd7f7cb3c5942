"""Changing what one module computes, and nothing else: its class becomes a subclass of it, made for the purpose."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

OPTIONS = "_fastvlp_options"
Build = Callable[[Any], Callable[..., Any]]


def change(module: Any, build: Build, options: Any) -> None:
    """Give ``module`` the forward ``build(its class)``, which finds ``options`` under the attribute ``OPTIONS``.

    Parameters, state-dict keys, hooks, ``isinstance``, the class's name, ``copy.deepcopy`` and pickling stay. ``build`` is a function of a
    module (pickling refers to it by name).
    """
    cls: Any = type(module)
    setattr(module, OPTIONS, options)
    module.__class__ = subclass(cls, build)


def restore(module: Any, original: Any, build: Build) -> None:
    """Undo :func:`change`; a second call does nothing.

    Raises:
        RuntimeError: the class was changed again meanwhile.
    """
    if not hasattr(module, OPTIONS):
        return
    if type(module) is not subclass(original, build):
        raise RuntimeError(f"restore: the class of this {original.__name__} was changed after fastvlp.accelerate; undo that change first")
    module.__class__ = original
    delattr(module, OPTIONS)


@cache
def subclass(cls: Any, build: Build) -> Any:
    """The subclass of ``cls`` with the forward ``build(cls)``; it keeps the name, which checkpoints record."""

    def reduce(self: Any, protocol: int) -> Any:
        return _revive, (cls, build), self.__dict__

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), {**names, "forward": build(cls), "__reduce_ex__": reduce})


def _revive(cls: Any, build: Build) -> Any:
    return (changed := subclass(cls, build)).__new__(changed)
