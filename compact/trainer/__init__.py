"""The training loop: the Trainer of transformers, on problems with K rationales each."""

from typing import TYPE_CHECKING

from compact.registry import lazy_names

if TYPE_CHECKING:
    from compact.trainer.records import NonFiniteError
    from compact.trainer.runlog import read_scores
    from compact.trainer.trainer import CompactTrainer

# Public name -> (module, name there); checkpoints.py alone needs no torch.
_LAZY = {
    "CompactTrainer": ("compact.trainer.trainer", "CompactTrainer"),
    "NonFiniteError": ("compact.trainer.records", "NonFiniteError"),
    "read_scores": ("compact.trainer.runlog", "read_scores"),
}
__getattr__ = lazy_names(__name__, _LAZY)
__all__ = ["CompactTrainer", "NonFiniteError", "read_scores"]
