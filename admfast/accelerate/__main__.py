"""`python -m admfast.accelerate PROGRAM ARGS...`."""

import sys

from admfast.accelerate.runner import main

if __name__ == "__main__":
    sys.exit(main())
