"""`python -m bdclean`."""

import os
import sys

if __name__ == "__main__":
    if sys.path[0] in ("", os.getcwd()):  # noqa: PTH109  (pathlib is not imported from there)
        del sys.path[0]  # no stray file of the current folder may run

    from bdclean.cli import main

    main()
