"""fastvlp: vision-language pre-training made cheap."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastvlp.integrations import accelerate as accelerate
    from fastvlp.integrations import restore as restore
    from fastvlp.systems.files import load as load


def __getattr__(name: str) -> Any:
    # Not before somebody asks: importing torch takes seconds, and ``fastvlp --version`` needs none of it.
    if name == "load":
        from fastvlp.systems.files import load

        return load
    if name in ("accelerate", "restore"):
        from fastvlp import integrations

        return getattr(integrations, name)
    raise AttributeError(f"module 'fastvlp' has no attribute {name!r}")
