"""``python -m fedrot.cli``."""

import sys

from . import main

sys.exit(main())
