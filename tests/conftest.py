"""Settings shared by every test: offline, one thread a worker, reproducible examples."""

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

# A shell starts background jobs with Ctrl-C ignored, and they would pass that on to the commands
# that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Two workers share two cores; a test that is about threads sets its own number.
torch.set_num_threads(1)

# Deadlines say more about a noisy machine than about the code. CI draws the same examples.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture
def own_registries() -> Iterator[None]:
    """What a test registers is gone after it."""
    from compact.answers.base import DOMAINS
    from compact.metrics import METRICS
    from compact.strategies import STRATEGIES
    from compact.weighting import POLICIES, PRESETS, TOKEN_WEIGHTS

    with ExitStack() as stack:
        for registry in (DOMAINS, METRICS, POLICIES, PRESETS, STRATEGIES, TOKEN_WEIGHTS):
            stack.enter_context(registry.temporary())
        yield
