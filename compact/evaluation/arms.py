"""The arms of a comparison: weightings, as the user writes them."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from compact.config import CompactConfig
from compact.data import Problem
from compact.fields import converted, field_types
from compact.files import parse_yaml
from compact.strategies import Strategy, make_strategy
from compact.trainer.setup import (
    check_strategy,
    encoded,
    have_loss,
    skips_of,
    training_problems,
)
from compact.weighting import TOKEN_WEIGHTS, make_weigher
from compact.weighting.policies import split_teacher

DEFAULT_ARMS = ("uniform", "answer-vote", "softmax-nll", "robust", "rejection")
OF_TRAINER = ("token_weights", "max_rationales_per_problem")
"""Settings of the trainer that an arm may change."""
OF_A_RUN: dict[str, Any] = {
    "resume_from_checkpoint": None,
    "load_best_model_at_end": False,
    "save_strategy": "no",
    "eval_strategy": "no",
    "eval_on_start": False,
    "push_to_hub": False,
    "report_to": "none",
    "disable_tqdm": True,
}
"""Settings of every run of an arm, whatever the recipe says: only `compact train` has checkpoints,
evaluation data and a model to keep."""


@dataclass(frozen=True)
class Arm:
    """One weighting in the comparison.

    Attributes:
        name: the arm as the user wrote it.
        preset: name of the preset or policy.
        overrides: changed settings of the preset or policy.
        strategy: name of the strategy, None for plain training.
        options: arguments of the strategy.
        settings: settings of the trainer that differ from the recipe's, of `OF_TRAINER`.
        gold: whether training sees the gold answers.
    """

    name: str
    preset: str
    overrides: dict[str, Any]
    strategy: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    gold: bool = True

    def seen(self, problems: Sequence[Problem]) -> list[Problem]:
        """Returns the problems as the arm trains on them."""
        return [p if self.gold else replace(p, answer=None) for p in problems]

    def configured(self, config: CompactConfig, **others: Any) -> CompactConfig:
        """Returns the trainer's settings with those of the arm, and others."""
        own = {"preset": self.preset, "overrides": self.overrides, "strategy": self.strategy}
        own["strategy_options"] = self.options or None
        return replace(config, **OF_A_RUN | own | self.settings | others)

    @property
    def names(self) -> list[str]:
        """All that may be a name in a registry: preset, strategy, metrics, token weights."""
        given = (self.preset, self.strategy, *self.overrides.values(), *self.settings.values())
        return [value for value in given if isinstance(value, str)]

    def check(self, config: CompactConfig, problems: Sequence[Problem]) -> None:
        """Checks that the arm goes together with the settings and problems that all arms share.

        Raises:
            ValueError: the trainer would refuse it.
        """
        own = self.configured(config)
        weigher = make_weigher(self.preset, **self.overrides)
        strategy = make_strategy(self.strategy, self.options)
        check_strategy(weigher, strategy, own)
        skips_of(weigher, strategy, own)
        training_problems(weigher, strategy, own, self.seen(problems))

    @property
    def may_read_nothing(self) -> bool:
        """Whether it may leave out every rationale; a strategy may write others."""
        skips = make_weigher(self.preset, **self.overrides).skips
        return self.strategy is None and skips is not None

    def check_read(
        self, config: CompactConfig, problems: Sequence[Problem], processing_class: Any
    ) -> None:
        """Checks that the arm, which has no strategy, has a rationale to train on.

        Raises:
            ValueError: it has none, or a problem cannot be encoded.
        """
        weigher = make_weigher(self.preset, **self.overrides)
        read = encoded(weigher, processing_class, self.configured(config), self.seen(problems))
        if not any(have_loss(weigher, Strategy(), read)):
            raise ValueError(
                f"--arms: {self.name}: the data must have a rationale that preset {self.preset} "
                f"trains on, got none in {len(read.problems.sample)} problems"
            )


def parse_arm(text: str, right_teachers: Collection[str] = ()) -> Arm:
    """Reads "NAME" or "NAME,key=value,...".

    Args:
        text: the arm as the user wrote it.
        right_teachers: teachers that are known to be right, for the arm "oracle".

    Raises:
        ValueError: the text does not have this form, or a name or setting is unknown.
    """
    # A comma only separates settings when "key=" follows it, so beta=[0, 1, 0] is one value.
    preset, *pairs = re.split(r",(?=\s*\w+=)", text)
    if "," in preset and split_teacher(preset)[1] is None:
        raise ValueError(f"--arms: expected NAME,key=value,..., got {text!r}")
    overrides = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        try:
            overrides[key.strip()] = parse_yaml(value, "--arms")
        except ValueError:
            raise ValueError(
                f"--arms: {key.strip()} of {preset} must be a YAML value, got {value!r}"
            ) from None
    if preset == "oracle" and right_teachers:
        overrides.setdefault("teachers", sorted(right_teachers))
    strategy, options = overrides.pop("strategy", None), overrides.pop("strategy_options", {})
    types = field_types(CompactConfig)
    settings = {
        name: converted(overrides.pop(name), types[name], f"--arms: {name} of {preset}")
        for name in OF_TRAINER
        if name in overrides
    }
    gold = overrides.pop("gold", True)
    if not isinstance(options, dict):
        raise ValueError(f"--arms: strategy_options of {preset} must be a mapping, got {options!r}")
    if not isinstance(gold, bool):
        raise ValueError(f"--arms: gold of {preset} must be true or false, got {gold!r}")
    TOKEN_WEIGHTS.get_or_raise(settings.get("token_weights", "none"))
    make_weigher(preset, **overrides)
    make_strategy(strategy, options)
    return Arm(text, preset, overrides, strategy, options, settings, gold)
