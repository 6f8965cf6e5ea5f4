"""``python -m poetx``: the command line."""

import sys

from poetx.cli.app import main

sys.exit(main())
