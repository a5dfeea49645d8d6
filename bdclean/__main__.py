"""`python -m bdclean`."""

from bdclean.cli import main

if __name__ == "__main__":
    main()
