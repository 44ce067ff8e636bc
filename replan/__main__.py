"""`python -m replan` is the same as `replan`; launchers that start modules need it."""

from replan.cli import main

if __name__ == "__main__":
    main()
