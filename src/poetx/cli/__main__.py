"""``python -m poetx.cli``, as ``python -m poetx``."""

import sys

from poetx.cli.app import main

sys.exit(main())
