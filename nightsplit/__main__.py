"""python -m nightsplit: the same as the command nightsplit."""

import os
import sys

if sys.path[0] == os.getcwd():  # noqa: PTH109  (pathlib is not loaded yet: a file there may have its name)
    del sys.path[0]  # the current folder: its files are no installed packages

from nightsplit.console.cli import main

sys.exit(main())
