"""Runs `python -m retinanet COMMAND ...`."""

import sys

from retinanet.commands import main

sys.exit(main())
