"""``python -m poetx.cli``, as ``python -m poetx``."""

import sys

from poetx.cli import main

sys.exit(main())
