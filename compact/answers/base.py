"""Defines answer domains, and finds the domain of a problem."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, NamedTuple, TypeVar

from compact.answers.reading import stated_answer, statements, visible
from compact.registry import Registry
from compact.text.steps import find_markers


class Alternative(NamedTuple):
    """One of the answers that a problem allows.

    Attributes:
        name: its normal form ("B", "no").
        text: its words as the data write them ("the field", "False").
    """

    name: str
    text: str


class Domain(ABC):
    """A kind of answer: how to extract it from a completion, and when two answers match.

    An instance belongs to one problem: a choice holds its problem's options. It must be frozen,
    hashable and picklable, as a frozen dataclass at the top level of a module is.

    Attributes:
        name: the name under which the domain is registered.
    """

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def recognise(cls, gold: str | None, prompt: str) -> Domain | None:
        """Returns the domain of the problem, or None if its answer is of another kind.

        Args:
            gold: the gold answer, None if the data has none.
            prompt: the question, with its options.
        """

    @classmethod
    def of_prompt(cls, prompt: str) -> Domain:
        """Returns the domain of a problem without a gold answer whose `answer_type` names it.

        A domain that holds more than its class, such as options, reads that from the prompt.
        """
        return cls()

    @abstractmethod
    def normalise(self, answer: str) -> str:
        """Returns the comparable form of an answer without a sentence around it ("(B)." -> "B").

        A text that is not an answer of this domain becomes plain text, which matches only itself.
        """

    @abstractmethod
    def extract(self, completion: str) -> str | None:
        """Returns the final answer that a completion states, normalised; None if there is none."""

    def alternatives(self, gold: str | None, prompt: str) -> tuple[Alternative, ...]:
        """Returns the answers that can be chosen, in order; () if the domain is open.

        Args:
            gold: the gold answer, None if the data has none.
            prompt: the question, with its options.
        """
        return ()

    def question(self, prompt: str) -> str:
        """Returns the prompt without the list of the answers that can be chosen."""
        return prompt

    def opening(self, sentence: str) -> str | None:
        """Returns the answer at the start of a sentence ("Yes, it would"), None without one."""
        return None

    def states(self, step: str) -> bool:
        """Whether a step of a rationale states an answer, right or wrong, or announces one."""
        return bool(find_markers(step))

    def matches(self, a: str | None, b: str | None) -> bool:
        """Whether two answers, raw or normalised, match. None never matches."""
        if a is None or b is None:
            return False
        return self.normalise(a) == self.normalise(b)


BUILT_IN = ("choice", "yes_no", "date", "number", "math", "text", "general")
"""The order in which the built-in domains are tried: narrower domains first."""

DOMAINS: Registry[type[Domain]] = Registry("answer_type")
D = TypeVar("D", bound=type[Domain])


def register_domain(name: str) -> Callable[[D], D]:
    """Returns a decorator that adds a domain class under a name.

    Raises:
        ValueError: the name is taken by another class, or is empty.
        TypeError: the decorated object is not a subclass of `Domain`.
    """

    def add(domain: D) -> D:
        if not (isinstance(domain, type) and issubclass(domain, Domain)):
            raise TypeError(f"register_domain: expected a subclass of Domain, got {domain!r}")
        DOMAINS.add(name, domain, domain)
        domain.name = name
        return domain

    return add


def domain_names() -> list[str]:
    """Returns the names of all domains in the order in which they are tried.

    Those that `BUILT_IN` does not list, as those of users, come first, the last registered one
    before the others. The built-in domains follow, narrower before wider.
    """
    users = [name for name in DOMAINS if name not in BUILT_IN]
    built_in = [name for name in BUILT_IN if name in DOMAINS]
    return [*reversed(users), *built_in]


def get_domain(name: str) -> type[Domain]:
    """Returns the domain class of a name.

    Raises:
        ValueError: no domain has this name.
    """
    return DOMAINS.get_or_raise(name, domain_names())


def find_domain(
    gold: str | None,
    prompt: str = "",
    answer_type: str | None = None,
    completions: Iterable[str] = (),
) -> Domain:
    """Returns the domain of a problem.

    The classes are tried in the order of `domain_names()`: those of users, then choice, yes_no,
    date, number, math, text, general. The first that recognises the problem is returned. So an
    answer with two possible readings gets the narrower one: "12" is a choice if it is the text of
    an option, and "05/01/2020" is a date, not a fraction.

    Without a gold answer, the domain is choice if the prompt has options and at least half of the
    completions state one (or if there is only one completion). Otherwise the answers that the
    completions state stand in for the gold one: the domain of most of them is returned, the
    narrower one in a tie. "Yes, it would float" counts as yes. If no completion has an answer
    marker, the domain is yes_no if half of them begin or end with such a sentence, else general,
    which reads numbers and short texts.

    Args:
        gold: the gold answer, None if the data has none.
        prompt: the question, with its options.
        answer_type: the name of the domain, if the data gives it.
        completions: the texts of the problem's rationales; read only without a gold answer.

    Raises:
        ValueError: there is no domain `answer_type`, `gold` is not an answer of it, or `gold` is
            only white space.
    """
    if gold is not None and not gold.strip():
        raise ValueError("gold: expected an answer or None, found an empty text")
    if answer_type is not None:
        kind = get_domain(answer_type)
        found = kind.of_prompt(prompt) if gold is None else kind.recognise(gold, prompt)
        if found is None:
            raise ValueError(
                f"gold: expected an answer of the domain {answer_type!r}, found {_shown(gold)}"
                + ("" if answer_type != "choice" else f" with the prompt {_shown(prompt[-200:])}")
            )
        return found
    rationales = list(completions) if gold is None else []
    for name in domain_names():
        found = DOMAINS[name].recognise(gold, prompt)
        if found is None or (gold is None and name == "choice" and _denied(found, rationales)):
            continue
        if gold is None and name == BUILT_IN[-1]:
            return _voted(rationales, prompt, found)
        return found
    raise ValueError(f"gold: no domain recognises {_shown(gold)}")


def _denied(choice: Domain, completions: Sequence[str]) -> bool:
    """Whether most of several completions state no option: "Points (a) and (b) meet"."""
    stating = [text for text in completions if find_markers(text)] or completions
    confirmed = sum(choice.extract(text) is not None for text in stating)
    return len(stating) > 1 and 2 * confirmed < len(stating)


def _voted(completions: Sequence[str], prompt: str, default: Domain) -> Domain:
    """Returns the domain of most answers that completions state, `default` if they state none."""
    names = domain_names()
    stated = [said for text in completions if (said := stated_answer(text)) is not None]
    votes = Counter(_kind(said, prompt) for said in stated)
    if votes:
        return max(votes, key=lambda domain: (votes[domain], -names.index(domain.name)))
    yes_no = get_domain("yes_no").of_prompt(prompt)
    read = [lines for text in completions if (lines := statements(visible(text)))]
    opened = sum(bool(yes_no.opening(x[0]) or yes_no.opening(x[-1])) for x in read)
    return yes_no if opened and 2 * opened >= len(completions) else default


def _kind(said: str, prompt: str) -> Domain:
    """Returns the domain of a stated answer.

    "Yes, it would float" is an answer of yes_no: the words behind "yes" are its reason.
    """
    for name in domain_names():
        found = DOMAINS[name].recognise(said, prompt)
        if found is None and name in ("yes_no", "date"):
            domain = DOMAINS[name].of_prompt(prompt)
            found = domain if domain.opening(said) else None
        if found is not None:
            return found
    raise ValueError(f"gold: no domain recognises {_shown(said)}")


def _shown(text: str | None) -> str:
    return repr(text if text is None or len(text) <= 200 else text[:200] + "...")


def unified(answers: Sequence[str | None], domain: Domain, gold: str | None) -> list[str | None]:
    """Returns the answers, each replaced by the first one that it matches.

    The gold answer is first, then the shorter ones, whatever their order: "al's nephew" and "bo's
    nephew" both match "nephew", but not each other. After this, two answers of the problem match if
    and only if their texts are equal.

    Args:
        answers: stated answers of one problem in normal form, None where none was read.
        domain: the domain of the problem.
        gold: the gold answer in normal form, None if there is none.
    """
    texts = [] if gold is None else [gold]
    of: dict[str | None, str | None] = {None: None}
    distinct = {answer for answer in answers if answer is not None}
    for answer in sorted(distinct, key=lambda text: (len(text), text)):
        equal = (text for text in texts if text == answer or domain.matches(text, answer))
        of[answer] = found = next(equal, answer)
        if found not in texts:
            texts.append(found)
    return [of[answer] for answer in answers]
