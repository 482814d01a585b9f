"""``python -m infogrowth VERB …``."""

import sys

from infogrowth.cli import main

sys.exit(main())
