"""``python -m heterolora_kernels``: the command line."""

import sys

from heterolora_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
