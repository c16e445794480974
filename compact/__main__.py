"""`python -m compact COMMAND`: the same as `compact COMMAND`."""

import sys

from compact.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
