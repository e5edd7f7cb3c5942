"""``python -m fastvlp`` and ``torchrun -m fastvlp``."""

import sys

from fastvlp.cli import main

if __name__ == "__main__":
    sys.exit(main())
