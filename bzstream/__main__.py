"""`python -m bzstream`: the command line."""

from bzstream.cli import main

if __name__ == "__main__":
    main()
