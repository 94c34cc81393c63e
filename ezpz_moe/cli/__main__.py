"""``python -m ezpz_moe.cli`` is ``ezpz-moe``."""

import sys

from ezpz_moe.cli import main

if __name__ == "__main__":
    sys.exit(main())
