"""Named prompt templates: how a question is put to a teacher.

`plain` and `step-by-step` are ordinary chain-of-thought prompts. The other eight are the
perspectives of MIND (arXiv 2601.03717), which gets different rationales from one teacher. The
perspectives are MIND's, the words are ours.
"""

from __future__ import annotations

from compact.data.problems import Message, Text

QUESTION = "{question}"
"""The place of the question in a template."""
_END = 'End with one line of the form "The answer is X".'

TEMPLATES = {
    "plain": f"{QUESTION}\n\nExplain how you get to the answer. {_END}",
    "step-by-step": (
        f"{QUESTION}\n\nThink step by step. Write each step on a line of its own, with its "
        f"calculation. {_END}"
    ),
    "formal": (
        f"{QUESTION}\n\nSolve this formally. Name the unknowns, write what is given as equations "
        f"or statements, and derive the answer from them line by line. {_END}"
    ),
    "intuitive": (
        f"{QUESTION}\n\nExplain this the way you would to a friend: say what is going on in plain "
        f"words, then why the answer must be what it is. {_END}"
    ),
    "decomposition": (
        f"{QUESTION}\n\nSplit this into smaller questions. Answer each of them in turn, then put "
        f"their answers together. {_END}"
    ),
    "planning": (
        f"{QUESTION}\n\nFirst write a short plan of what has to be found and in which order. Then "
        f"carry out the plan, one step a line. {_END}"
    ),
    "analogy": (
        f"{QUESTION}\n\nThink of a simpler, familiar situation with the same structure. Solve "
        f"that one, then solve this question in the same way. {_END}"
    ),
    "socratic": (
        f"{QUESTION}\n\nReason in questions and answers: ask yourself what you need to know next, "
        f"answer it, and go on until the question is settled. {_END}"
    ),
    "contrastive": (
        f"{QUESTION}\n\nShow a mistake that is easy to make here and say why it is wrong. Then "
        f"give the sound reasoning. {_END}"
    ),
    "counterfactual": (
        f"{QUESTION}\n\nReason to an answer. Then change one of the given facts, say what would "
        f"follow, and use this to check your reasoning about the question as asked. {_END}"
    ),
}
"""Name -> template."""


def find_template(name: str) -> str:
    """Returns a named template, or the text itself if it is a template of your own.

    Raises:
        ValueError: the text is neither a known name nor has a place for the question.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name.count(QUESTION) != 1:
        raise ValueError(
            f"template must be one of {', '.join(TEMPLATES)}, or a text with {QUESTION} once, "
            f"got {name[:60]!r}"
        )
    return name


def messages_of(prompt: Text, template: str, system: str | None = None) -> list[Message]:
    """Returns the chat that puts a question to a teacher.

    Args:
        prompt: the question. Of a chat, the template takes the last message of the user.
        template: a text with `{question}` once.
        system: the system message; it replaces one of the prompt.

    Raises:
        ValueError: a chat without a message of the user.
    """
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    last = max((i for i, m in enumerate(chat) if m["role"] == "user"), default=None)
    if last is None:
        raise ValueError("prompt must hold a message of the user, got none")
    chat[last] = {"role": "user", "content": template.replace(QUESTION, chat[last]["content"])}
    if system is not None:
        chat = [{"role": "system", "content": system}, *(m for m in chat if m["role"] != "system")]
    return chat
