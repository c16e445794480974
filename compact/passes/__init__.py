"""One forward of the student over problems: encoding, layout, packing, what the pass leaves."""

from compact.passes.needs import Needs
from compact.passes.types import Batch, Block, EncodedProblem, EncodedRationale, Pass

__all__ = ["Batch", "Block", "EncodedProblem", "EncodedRationale", "Needs", "Pass"]
