"""`bdclean` and `python -m bdclean`: listens for signals before it imports the command line."""

import os
import sys

try:
    os.getcwd()  # noqa: PTH109  (pathlib is later)
except OSError:
    print("bdclean: the current folder has been removed; go to another one.", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__" and sys.path[0] in ("", os.getcwd()):  # noqa: PTH109  (pathlib is later)
    del sys.path[0]  # no stray file of the current folder may run

from bdclean import stopping

if "multiprocessing.spawn" not in sys.modules:  # a worker ends as its command wants
    stopping.listen()

# Outside of `run` for workers, which thereby find the modules that the run was told of.
with stopping.importing():
    from bdclean.cli import main


def run() -> None:
    """Runs the command line on the words of the process."""
    main()


if __name__ == "__main__":
    run()
