"""python -m nightsplit: the same as the command nightsplit."""

import sys

from nightsplit.console.cli import main

sys.exit(main())
