"""The training loop: the Trainer of transformers, on problems with K rationales each."""

from compact.trainer.records import NonFiniteError
from compact.trainer.runlog import read_scores
from compact.trainer.trainer import CompactTrainer

__all__ = ["CompactTrainer", "NonFiniteError", "read_scores"]
