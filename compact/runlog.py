"""The old place of `read_scores`, kept for code that imports it from here."""

from compact.trainer.runlog import read_scores

__all__ = ["read_scores"]
