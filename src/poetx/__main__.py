"""``python -m poetx``: the command line."""

import sys

from poetx.cli.commands import main

sys.exit(main())
