"""What ends a run, in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastvlp.train.step import TrainingError

STAYS = "the last whole checkpoint stays, and the same command continues from it"


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Errors of the machine as a ``TrainingError`` that says what to do; what has a sentence already passes.

    Args:
        folder: of the run, for errors of a disk that name no file.
    """
    from safetensors import SafetensorError

    try:
        yield
    except TrainingError:
        raise
    except OSError as error:
        raise TrainingError(f"{error.filename or folder}: {error.strerror or error}; {STAYS}") from error
    except SafetensorError as error:
        raise TrainingError(f"{folder}: the model could not be written: {error}; {STAYS}") from error
    except MemoryError as error:
        raise TrainingError(f"out of memory; lower data.batch_size, or set train.tokens; {STAYS}") from error
    except RuntimeError as error:
        said = _sentence(error)
        if said is None:
            raise
        raise TrainingError(f"{said}; {STAYS}") from error


def _sentence(error: RuntimeError) -> str | None:
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return "out of memory; lower data.batch_size, set train.tokens (smaller micro-batches), or train.checkpointing"
    if "DataLoader worker" in text and "Original Traceback" in text:  # what the worker raised stands in the last line
        return text.strip().splitlines()[-1].partition(": ")[2]
    if "DataLoader" in text and ("killed by signal" in text or "exited unexpectedly" in text):
        return f"a loading process died ({' '.join(text.split())[:100]}), most often because the memory was full; lower data.workers"
    if "DataLoader timed out" in text:
        return f"{text}: the data cannot be read any more (run.timeout)"
    if any(words in text for words in ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")):
        return f"another process of this run has ended, and its own message says why ({' '.join(text.split())[-120:]})"
    return None
