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
    module (pickling refers to it by name); without ``OPTIONS`` its forward is that of the class.
    """
    cls: Any = type(module)
    setattr(module, OPTIONS, options)
    # Not an attribute ``forward`` on the instance: deepcopy and pickle would bind it to the old module, and FSDP2 also swaps classes.
    module.__class__ = subclass(cls, build)


def changed(module: Any) -> bool:
    """Whether the module computes differently by :func:`change`."""
    return OPTIONS in vars(module)


def restore(module: Any) -> None:
    """Undo :func:`change`; a module that is not changed stays. A class that was put on top since, as FSDP2's, stays too."""
    if not changed(module):
        return
    delattr(module, OPTIONS)
    # Under a class that FSDP2 put on top, ours stays as an ancestor, and finds no options any more: it then calls the original.
    if "_fastvlp_original" in vars(type(module)):
        module.__class__ = type(module)._fastvlp_original


@cache
def subclass(cls: Any, build: Build) -> Any:
    """The subclass of ``cls`` with the forward ``build(cls)``; it keeps the name, which checkpoints record."""

    # A class that is made at run time cannot be found by name; it is made again where it is unpickled.
    def reduce(self: Any, protocol: int) -> Any:
        return _revive, (cls, build), self.__dict__

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, "_fastvlp_original": cls}
    return type(cls.__name__, (cls,), {**names, "forward": build(cls), "__reduce_ex__": reduce})


def _revive(cls: Any, build: Build) -> Any:
    made = subclass(cls, build)
    return made.__new__(made)
