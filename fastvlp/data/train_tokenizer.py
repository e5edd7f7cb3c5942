"""Train a tokenizer on the captions of shards. The shipped one comes from

    python -m fastvlp.data.train_tokenizer mini:train --vocab-size 4096 --no-ends --output fastvlp/data/mini/tokenizer.json
"""

from __future__ import annotations

import argparse

from fastvlp.data.samples import captions
from fastvlp.data.tokenizer import train_tokenizer


def main(arguments: list[str] | None = None) -> None:
    """Train a tokenizer on all captions of shards."""
    parser = argparse.ArgumentParser(prog="python -m fastvlp.data.train_tokenizer", description=main.__doc__)
    parser.add_argument("shards", nargs="+", help="training shards: paths, globs, brace ranges or mini:train")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--output", default="tokenizer.json")
    parser.add_argument("--no-ends", dest="ends", action="store_false",
                        help="no start and end tokens: for a bidirectional, mean-pooled text tower")
    options = parser.parse_args(arguments)
    tokenizer = train_tokenizer(captions(options.shards), options.vocab_size, ends=options.ends)
    tokenizer.save(options.output)
    print(f"{options.output}: {tokenizer.vocab_size} tokens")


if __name__ == "__main__":
    main()
