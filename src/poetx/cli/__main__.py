"""``python -m poetx.cli``, as ``python -m poetx``."""

import sys

from poetx.cli.commands import main

sys.exit(main())
