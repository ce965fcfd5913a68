"""python -m console: the same as nightsplit."""

import sys

from console.main import main

sys.exit(main())
