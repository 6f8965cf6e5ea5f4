"""``python -m poetx``: the command line."""

import sys

from poetx.cli import main

sys.exit(main())
