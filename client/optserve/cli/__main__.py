"""`python -m optserve.cli` is `optserve`: how the demo starts its server with the same Python."""

from optserve.cli.program import main

if __name__ == "__main__":
    main()
