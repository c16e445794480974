"""`python -m compact COMMAND`: the same as `compact COMMAND`."""

import atexit
import os
import sys

from compact.commands.cli import REPORT_TO_LAUNCHER, main


def _main_of_rank() -> None:
    """Runs `main` in one of several processes, and ends it before Python takes itself apart.

    PyTorch's caches keep the groups of FSDP2 although they were destroyed, and with them gloo's
    threads. If one of these asks for Python's lock while Python ends, the process aborts (SIGABRT)
    although its work is done. The function that is registered first runs last.
    """
    status = 1  # of an error that `main` does not report

    def end() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    atexit.register(end)
    status = main()


if __name__ == "__main__":
    if REPORT_TO_LAUNCHER in os.environ:
        _main_of_rank()
    else:
        sys.exit(main())
