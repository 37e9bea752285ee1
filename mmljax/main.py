"""``python -m mmljax.main --config configs/inshop.py`` is ``mmljax train --config ...``."""

import sys

from mmljax.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
