"""`python -m bdclean`."""

import os
import sys

if __name__ == "__main__" and sys.path[0] in ("", os.getcwd()):  # noqa: PTH109  (pathlib is later)
    del sys.path[0]  # no stray file of the current folder may run

# Outside of `main` for workers, which thereby find the modules that the run was told of.
from bdclean.cli import main

if __name__ == "__main__":
    main()
