"""python -m nightsplit: the same as the command nightsplit."""

import sys

from nightsplit.console.main import main

sys.exit(main())
