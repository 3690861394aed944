"""`python -m eesd <command>`: the entry point that every workflow rule calls."""

from eesd.cli import main

if __name__ == "__main__":
    main()
