"""`python -m qtool` is the same program as the console script `qtool`."""

from qtool.cli.app import main

if __name__ == "__main__":
    main()
