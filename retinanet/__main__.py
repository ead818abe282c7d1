"""`python -m retinanet COMMAND ...`, or `retinanet COMMAND ...` once it is installed."""

import sys

from retinanet.commands import main

if __name__ == "__main__":
    sys.exit(main())
