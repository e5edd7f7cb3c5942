"""Captions to token ids, by the name of a tokenizer or from a tokenizer.json file."""

from __future__ import annotations

import gzip
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from fastvlp.data.shards import printable

if TYPE_CHECKING:
    import tokenizers

START, END = "<|startoftext|>", "<|endoftext|>"
MINI = Path(__file__).parent / "mini" / "tokenizer.json"
KNOWN = 1 << 24  # bytes of captions whose tokens are remembered
MARGIN = 64  # tokens at the end of a text that is cut, which may differ from those of the whole
LARGEST = 1 << 28  # bytes of a tokenizer.json; those of large language models have 10 to 40 MB


class Tokenizer:
    """Encodes one caption at a time, with the start and end tokens that its file defines; without any, an empty caption is token 0.

    Attributes:
        vocab_size: number of ids, special ones included.
        context_length: longest result (start and end tokens included); longer captions are cut before the end token. None: not cut.
    """

    def __init__(self, core: tokenizers.Tokenizer, context_length: int | None = None) -> None:
        self.core = core
        core.no_truncation()
        core.no_padding()
        core.encode_special_tokens = True  # a caption that spells "<|endoftext|>" does not get to end itself
        with_ends, body = core.encode("a").ids, core.encode("a", add_special_tokens=False).ids
        first = next((i for i in range(len(with_ends)) if with_ends[i:i + len(body)] == body), 0)
        self.start, self.end = with_ends[:first], with_ends[first + len(body):]
        self.vocab_size: int = core.get_vocab_size()
        self.context_length = context_length
        self._known: dict[str, tuple[int, ...]] = {}
        self._held = 0

    def encode(self, text: str, context_length: int | None = None) -> list[int]:
        """Token ids of one caption; ``context_length`` overrides the tokenizer's own."""
        limit = self.context_length if context_length is None else context_length
        if limit is None:
            return [*self.start, *self.words(text), *self.end] or [0]
        room = limit - len(self.start) - len(self.end)
        if room < 1:
            raise ValueError(f"context_length is {limit}; start, end and one token need at least {limit - room + 1}")
        return [*self.start, *self._first(text, room), *self.end] or [0]

    def _first(self, text: str, room: int) -> tuple[int, ...]:
        """The first ``room`` tokens. Of a text of a million characters only so much is encoded that more tokens than these come out:
        tokenizers split text into words, so that what comes later cannot change them."""
        reach = 64 * room + 1024
        while reach < len(text):
            body = self.words(text[:reach])
            if len(body) >= room + MARGIN:
                return body[:room]
            reach *= 4  # white space
        return self.words(text)[:room]

    def words(self, text: str) -> tuple[int, ...]:
        """Token ids of a text without start and end, however long."""
        found = self._known.get(text)
        if found is None:
            found = tuple(self.core.encode(text, add_special_tokens=False).ids)
            size = _nbytes(text, found)
            if size <= KNOWN // 64:
                self._known[text] = found
                self._held += size
            while self._held > KNOWN:
                oldest = next(iter(self._known))
                self._held -= _nbytes(oldest, self._known.pop(oldest))
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a tokenizer.json that ``load_tokenizer`` and the tokenizers library read."""
        self.core.save(str(path))

    def __reduce__(self) -> tuple[object, ...]:
        return _from_json, (self.core.to_str(), self.context_length)


def load_tokenizer(name: str | os.PathLike[str], context_length: int | None = None) -> Tokenizer:
    """A tokenizer by name ("mini": the shipped one; "clip": CLIP's 49,408 tokens) or from a tokenizer.json file or its folder.

    "clip" is built from the vocabulary file that the package open_clip_torch carries; captions come out as open_clip's do, except
    that mis-encoded text and HTML entities are not repaired.

    Raises:
        ImportError: the tokenizers library, or for "clip" open_clip_torch, is not installed.
        FileNotFoundError, ValueError: no such name or file, or a file that is no tokenizer.
    """
    library = _tokenizers()
    if name == "clip":
        return Tokenizer(_clip(library), context_length)
    path = MINI if name == "mini" else Path(name)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer {str(name)!r}; give 'mini', 'clip', a tokenizer.json file or a folder that holds one")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; a tokenizer.json has at most {LARGEST:,}")
    try:
        return Tokenizer(library.Tokenizer.from_str(path.read_text(encoding="utf-8")), context_length)
    except Exception as error:  # the library raises the bare class
        raise ValueError(f"{path} is not a tokenizer.json that the tokenizers library reads: {printable(str(error))}") from error


def train_tokenizer(captions: Iterable[str], vocab_size: int = 4096, min_frequency: int = 2, ends: bool = True) -> Tokenizer:
    """Byte-level BPE on lowercase NFC text; runs of white space, underscores and commas count as one space.

    ``ends``: put a start and an end token around captions. A bidirectional tower that takes the mean of its tokens needs neither.
    """
    library = _tokenizers()
    core = library.Tokenizer(library.models.BPE())
    core.normalizer = library.normalizers.Sequence([
        library.normalizers.NFC(),
        library.normalizers.Lowercase(),
        library.normalizers.Replace(library.Regex(r"[\s_,]+"), " "),
        library.normalizers.Strip(),
    ])
    core.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = library.decoders.ByteLevel()
    alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(captions, library.trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=[START, END], initial_alphabet=alphabet, show_progress=False))
    if ends:
        core.post_processor = _ends(library, core.token_to_id(START), core.token_to_id(END))
    return Tokenizer(core)


def _clip(library: ModuleType) -> tokenizers.Tokenizer:
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise ImportError("the tokenizer 'clip' needs the vocabulary of open_clip: pip install open_clip_torch; or use 'mini' or a file")
    with gzip.open(Path(package.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1:49152 - 256 - 2 + 1]
    merges = [(left, right) for left, right in (line.split() for line in lines)]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*alphabet, *(symbol + "</w>" for symbol in alphabet), *(left + right for left, right in merges), START, END]
    core = library.Tokenizer(library.models.BPE({token: i for i, token in enumerate(tokens)}, merges, end_of_word_suffix="</w>"))
    core.add_special_tokens([START, END])
    core.normalizer = library.normalizers.Sequence([
        library.normalizers.Replace(library.Regex(r"\s+"), " "), library.normalizers.Strip(), library.normalizers.Lowercase()])
    words = library.Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    core.pre_tokenizer = library.pre_tokenizers.Sequence([
        library.pre_tokenizers.Split(words, behavior="removed", invert=True),
        library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    core.post_processor = _ends(library, len(tokens) - 2, len(tokens) - 1)
    return core


def _ends(library: ModuleType, start: int, end: int) -> tokenizers.processors.PostProcessor:
    return library.processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=[(START, start), (END, end)])


def _nbytes(text: str, ids: tuple[int, ...]) -> int:
    return sys.getsizeof(text) + sys.getsizeof(ids) + 32 * len(ids) + 100


def _from_json(text: str, context_length: int | None) -> Tokenizer:
    return Tokenizer(_tokenizers().Tokenizer.from_str(text), context_length)


def _tokenizers() -> ModuleType:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("captions need the tokenizers library: pip install 'fastvlp[train]'") from error
    return tokenizers
