"""`python -m compact COMMAND`: the same as `compact COMMAND`."""

import atexit
import os
import sys

from compact.commands.cli import REPORT_TO_LAUNCHER, main


def _main_of_rank() -> None:
    """Runs `main` in one of several processes, and ends the process without Python's clean-up.

    The threads of gloo still run then, because PyTorch's caches keep the groups of FSDP2 after they
    were destroyed. During Python's clean-up such a thread can abort the process (SIGABRT), although
    its work is done.
    """
    status = 1  # of an error that `main` does not report

    def end() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    atexit.register(end)  # what is registered first runs last, so after the libraries' functions
    status = main()


if __name__ == "__main__":
    if REPORT_TO_LAUNCHER in os.environ:
        _main_of_rank()
    else:
        sys.exit(main())
