"""Turns scores into one weight per rationale: presets, policies and their weighers."""

import importlib

from compact.weighting.gold import check_gold
from compact.weighting.policies import POLICIES, Skips, register_policy
from compact.weighting.presets import PRESETS, Preset, register_preset
from compact.weighting.token_weights import (
    TOKEN_WEIGHTS,
    check_token_weights,
    register_token_weights,
    weigh_tokens,
)
from compact.weighting.weighers import (
    PresetWeigher,
    Weigher,
    Weights,
    make_weigher,
    skip_beyond,
    skip_wrong,
    weigher_names,
)

# Policies with a file of their own, which states formula, source and what is ours.
for _name in ("gradients", "mind", "muki"):
    importlib.import_module(f"compact.weighting.{_name}")

__all__ = [
    "POLICIES",
    "PRESETS",
    "TOKEN_WEIGHTS",
    "Preset",
    "PresetWeigher",
    "Skips",
    "Weigher",
    "Weights",
    "check_gold",
    "check_token_weights",
    "make_weigher",
    "register_policy",
    "register_preset",
    "register_token_weights",
    "skip_beyond",
    "skip_wrong",
    "weigh_tokens",
    "weigher_names",
]
