"""`python -m compact COMMAND`: the same as `compact COMMAND`."""

import atexit
import os
import sys

from compact.commands.cli import REPORT_TO_LAUNCHER, main


def _main_of_rank() -> None:
    """Runs `main` in one of several processes, and ends the process without Python's clean-up.

    PyTorch's caches keep the process groups of FSDP2 even after they were destroyed. So threads of
    gloo still run at the end. During Python's clean-up such a thread can abort the process
    (SIGABRT), although the work is done.
    """
    status = 1  # of an error that `main` does not report

    def end() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    atexit.register(end)  # what is registered first runs last, so after the libraries' functions
    try:
        status = main()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        raise


if __name__ == "__main__":
    if REPORT_TO_LAUNCHER in os.environ:
        _main_of_rank()
    else:
        sys.exit(main())
