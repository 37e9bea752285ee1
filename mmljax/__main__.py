"""``python -m mmljax VERB`` is the console script ``mmljax VERB``."""

import sys

from mmljax.cli import main

if __name__ == "__main__":
    sys.exit(main())
