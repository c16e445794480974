"""What a domain of answers is, and which domain a problem belongs to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, TypeVar

from compact.registry import Registry


class Domain(ABC):
    """A kind of answer: how it is read out of a completion and when two are the same.

    An instance belongs to one problem: a choice holds its problem's options. It is frozen, hashable
    and picklable; a frozen dataclass at the top of a module is.

    Attributes:
        name: what the domain is called where one is asked for.
    """

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def recognise(cls, gold: str | None, prompt: str) -> Domain | None:
        """Returns the domain of the problem, or None where its answer is of another kind.

        Args:
            gold: the gold answer, None for data without.
            prompt: the question, with its options.
        """

    @abstractmethod
    def normalise(self, answer: str) -> str:
        """Returns the one comparable form of an answer given bare ("(B)." -> "B").

        A text that is no answer of this domain becomes plain text, which matches only itself.
        """

    @abstractmethod
    def extract(self, completion: str) -> str | None:
        """Returns the final answer that a completion states, normalised; None if there is none."""

    def matches(self, a: str | None, b: str | None) -> bool:
        """Whether two answers, raw or normalised, are the same. None never matches."""
        if a is None or b is None:
            return False
        return self.normalise(a) == self.normalise(b)


BUILT_IN = ("choice", "yes_no", "date", "number", "math", "text", "general")
"""The order in which the built-in domains are asked: the narrower one first."""
_OURS = "compact.answers."

DOMAINS: Registry[type[Domain]] = Registry("answer_type")
D = TypeVar("D", bound=type[Domain])


def register_domain(name: str) -> Callable[[D], D]:
    """Returns a decorator that adds a domain class under a name.

    Raises:
        ValueError: the name is taken by another class, or is empty.
        TypeError: what is decorated is not a subclass of `Domain`.
    """

    def add(domain: D) -> D:
        if not (isinstance(domain, type) and issubclass(domain, Domain)):
            raise TypeError(f"register_domain: expected a subclass of Domain, got {domain!r}")
        DOMAINS.add(name, domain, domain)
        domain.name = name
        return domain

    return add


def domain_names() -> list[str]:
    """Returns the names of all domains in the order in which they are asked.

    Those of users come first, the last one registered before the others; then the built-in ones,
    the narrower before the wider.
    """
    users = [name for name, d in DOMAINS.items() if not d.__module__.startswith(_OURS)]
    built_in = [name for name in BUILT_IN if name in DOMAINS]
    return [*reversed(users), *built_in]


def get_domain(name: str) -> type[Domain]:
    """Returns the domain class of a name.

    Raises:
        ValueError: no domain has this name.
    """
    return DOMAINS.get_or_raise(name, domain_names())


def find_domain(gold: str | None, prompt: str = "", answer_type: str | None = None) -> Domain:
    """Returns the domain of a problem.

    The classes are asked in the order of `domain_names()` and the first that recognises the problem
    is taken: those of users, then choice, yes_no, date, number, math, text, general. So an answer
    that could be read in two ways is read in the narrower one: "12" is a choice if it is the text
    of an option, "05/01/2020" is a date and no fraction. Without a gold answer it is a choice where
    the prompt has options, else general, which reads numbers and short texts.

    Args:
        gold: the gold answer, None for data without.
        prompt: the question, with its options.
        answer_type: the name of the domain, where the data say it.

    Raises:
        ValueError: there is no domain `answer_type`, or `gold` is no answer of it; or `gold` has
            nothing but white space.
    """
    if gold is not None and not gold.strip():
        raise ValueError("gold: expected an answer or None, found a text without content")
    if answer_type is not None:
        found = get_domain(answer_type).recognise(gold, prompt)
        if found is None:
            raise ValueError(
                f"gold: expected an answer of the domain {answer_type!r}, found {_shown(gold)}"
                + ("" if answer_type != "choice" else f" with the prompt {_shown(prompt[-200:])}")
            )
        return found
    for name in domain_names():
        found = DOMAINS[name].recognise(gold, prompt)
        if found is not None:
            return found
    raise ValueError(f"gold: no domain recognises {_shown(gold)}")


def _shown(text: str | None) -> str:
    return repr(text if text is None or len(text) <= 200 else text[:200] + "...")
