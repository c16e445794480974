"""Types of the native module that csrc/graph/bind.cpp defines."""

import numpy as np

def assemble(
    problem_offsets: np.ndarray,
    step_offsets: np.ndarray,
    item_offsets: np.ndarray,
    items: np.ndarray,
    content: np.ndarray,
    state: np.ndarray,
    threshold: float,
) -> dict[str, np.ndarray]: ...
