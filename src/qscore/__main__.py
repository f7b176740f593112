"""`python -m qscore`."""

from qscore.cli import main

if __name__ == "__main__":
    main()
