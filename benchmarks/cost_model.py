"""Operations, bytes and seconds of a step as formulas, and their rates fitted to measurements.

The tables of docs/performance.md, which `benchmarks.cost` writes, come from here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.draw import Run, all_runs, largest, last_runs
from benchmarks.scale import CUE, GOLD, STEP
from benchmarks.students import SIZES, Size, size

TEACHERS = (1, 2, 3, 4, 5, 6, 7, 8)
MEASURED_TEACHERS = (1, 2, 4, 8)
BLOCK = 512  # logits of a row that the head operator holds at a time
LORA_RANK = 16
PROVIDERS = ("sft", "compact", "compact-probes")


@dataclass(frozen=True)
class Work:
    """One step of a student: P questions of Q tokens with K rationales of T tokens each.

    Attributes:
        student: sizes of the student.
        vocabulary: V.
        teachers: K.
        prompt: Q.
        rationale: T.
        problems: P.
    """

    student: Size
    vocabulary: int
    teachers: int = 4
    prompt: int = 72
    rationale: int = 64
    problems: int = 1

    @classmethod
    def of(cls, shape: str) -> Work:
        """Reads a shape of the case `scale`."""
        part = dict(p.split("=") for p in shape.split(","))
        k, q, t, p, v = (int(part[key]) for key in "KQTPV")
        return cls(size(part["student"]), v, k, q, t, p)

    @property
    def sft_tokens(self) -> int:
        """Tokens of K padded rows per question; SFT computes the head for all of them."""
        return self.problems * self.teachers * (self.prompt + self.rationale)

    @property
    def tree_tokens(self) -> int:
        """Tokens of one row in tree layout per question: the question once, then the rationales."""
        return self.problems * (self.prompt + self.completion)

    @property
    def completion(self) -> int:
        """K T, tokens of the rationales of one question."""
        return self.teachers * self.rationale

    @property
    def leaves(self) -> int:
        """1 + K S answer leaves per question: one after each step (of STEP tokens), one before."""
        return 1 + self.teachers * max(self.rationale // STEP, 1)


# --- formulas ---------------------------------------------------------------------------------


def attention(student: Size, queries: int, keys: int, passes: int) -> float:
    """Operations of attention scores and values: 4 H q k per layer forward, twice that backward."""
    return 4.0 * student.layers * student.width * queries * keys * passes


def body_flops(work: Work, provider: str) -> float:
    """Operations of the body: 2 N forward and 2 N backward a token (LoRA), and attention."""
    one = work.student
    if provider == "sft":
        row = work.prompt + work.rationale
        rows = work.problems * work.teachers
        return 4.0 * one.body * work.sft_tokens + rows * attention(one, row, row, 3)
    row = work.prompt + work.completion
    parts = attention(one, work.prompt, work.prompt, 3)
    parts += work.teachers * attention(one, work.rationale, work.prompt + work.rationale, 3)
    flops = 4.0 * one.body * work.tree_tokens + work.problems * parts
    if provider == "compact-probes":
        fed = work.leaves * (CUE + GOLD - 1)
        flops += work.problems * (2.0 * one.body * fed + attention(one, fed, row + fed, 1))
    return flops


def logits(work: Work, provider: str) -> float:
    """Logits computed, each for 4 H operations; a leaf's, without gradient, counts as a half."""
    if provider == "sft":
        return float(work.sft_tokens * work.vocabulary)
    rows = work.problems * work.completion
    if provider == "compact-probes":
        return (rows + work.problems * work.leaves * GOLD / 2.0) * work.vocabulary
    return float(rows * work.vocabulary)


def flops(work: Work, provider: str) -> float:
    """Operations of a step."""
    return body_flops(work, provider) + 4.0 * work.student.width * logits(work, provider)


def activation_bytes(work: Work, provider: str) -> float:
    """What a plain backward keeps of the body: about 10 H + 4 F float32 a token and layer."""
    one = work.student
    tokens = work.sft_tokens if provider == "sft" else work.tree_tokens
    return 4.0 * tokens * one.layers * (10 * one.width + 4 * one.inner)


def fixed_bytes(work: Work, provider: str) -> float:
    """Gradients of LoRA's factors, and of COMPACT's head the unit gradients and a block."""
    one = work.student
    keys = one.width // one.heads * one.key_heads
    sides = 6 * one.width + 2 * keys + 3 * (one.width + one.inner) - 2 * one.width
    found = 4.0 * one.layers * LORA_RANK * sides
    if provider != "sft":
        found += 4.0 * work.problems * work.completion * (one.width + BLOCK)
    return found


# --- rates, fitted on the smallest student ----------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """The rates that convert operations and bytes to seconds and memory, for one provider.

    Attributes:
        body: seconds per operation of the body.
        head: seconds per logit at the smallest student's width.
        width: that width.
        product: seconds per operation of the head's products, for other widths.
        kept: share of `activation_bytes` that is kept in memory.
        logit: bytes kept per logit (0 if logits are not kept).
    """

    body: float
    head: float
    width: int
    product: float
    kept: float
    logit: float

    def seconds(self, work: Work, provider: str) -> float:
        """Time of a step."""
        each = self.head + 4.0 * (work.student.width - self.width) * self.product
        return self.body * body_flops(work, provider) + each * logits(work, provider)

    def bytes(self, work: Work, provider: str) -> float:
        """Peak memory of a step above the model's own."""
        found = self.kept * activation_bytes(work, provider) + fixed_bytes(work, provider)
        return found + self.logit * (logits(work, provider) if provider == "sft" else 0.0)


def _least_squares(columns: Sequence[np.ndarray], want: np.ndarray) -> list[float]:
    """Fits want = sum of factor x column with relative errors; a factor below 0 becomes 0."""
    table = np.stack(columns, axis=1) / want[:, None]
    factors = np.linalg.lstsq(table, np.ones(len(want)), rcond=None)[0]
    if (factors < 0).any() and len(columns) == 2:
        keep = int(np.argmax(factors))
        alone = table[:, keep]
        factors = np.zeros(2)
        factors[keep] = alone.sum() / (alone @ alone)
    return [float(f) for f in factors]


def fit(runs: Sequence[Run], provider: str, product: float) -> Rates:
    """Fits a provider's rates on the runs of the smallest student.

    Args:
        runs: runs of the case `scale`.
        provider: one of PROVIDERS.
        product: seconds per operation of the head's matrix products.

    Raises:
        ValueError: fewer than three runs of the smallest student.
    """
    works = [(Work.of(one.shape), one) for one in runs]
    mine = [(w, one) for w, one in works if w.student == SIZES[0]]
    if len(mine) < 3:
        raise ValueError("scale.csv: expected at least three shapes of the smallest student")

    def column(of: Callable[[Work, str], float]) -> np.ndarray:
        return np.array([of(w, provider) for w, _ in mine])

    seconds = np.array([one.figure(provider, "median_s") for _, one in mine])
    body, head = _least_squares([column(body_flops), column(logits)], seconds)
    peak = np.array([one.figure(provider, "peak_mb") for _, one in mine]) * 1e6
    grown = peak - column(fixed_bytes)
    if provider == "sft":
        kept, logit = _least_squares([column(activation_bytes), column(logits)], grown)
    else:
        (kept,), logit = _least_squares([column(activation_bytes)], grown), 0.0
    return Rates(body, head, SIZES[0].width, product, kept, logit)


@dataclass(frozen=True)
class Results:
    """Measured runs of `scale`, and the fitted rates.

    Attributes:
        runs: the runs of one machine and commit, by their work.
        rates: the rates, by provider.
        machine: that machine.
        when: that commit, and the day of the last of these runs.
        long: the last runs of the case `long` on each machine, by length.
        host: the last run of the case `host`, after the others of its commit and machine.
        steps: the last run of the case `step` on each machine.
    """

    runs: dict[Work, Run]
    rates: dict[str, Rates]
    machine: str
    when: str
    long: Sequence[Run] = ()
    host: Sequence[Run] = ()
    steps: Sequence[Run] = ()

    def measured(self, work: Work, provider: str, field: str) -> float | None:
        """Returns the measured ratio to plain SFT, or None if this step was not measured."""
        one = self.runs.get(work)
        return None if one is None else one.figure(provider, field) / one.figure("sft", field)

    def computed(self, work: Work, provider: str, field: str) -> float:
        """Returns the ratio to plain SFT that the formulas give."""
        of = Rates.seconds if field == "median_s" else Rates.bytes
        return of(self.rates[provider], work, provider) / of(self.rates["sft"], work, "sft")

    def errors(self, field: str, *, fitted: bool) -> list[float]:
        """Returns the relative errors of the computed ratios.

        Args:
            field: "median_s" or "peak_mb".
            fitted: whether to take the student that the rates were fitted to, or all others.
        """
        found = []
        for work in self.runs:
            if (work.student == SIZES[0]) == fitted:
                for provider in ("compact", "compact-probes"):
                    measured = self.measured(work, provider, field)
                    assert measured is not None
                    found.append(abs(self.computed(work, provider, field) / measured - 1))
        return found


def load(folder: Path) -> Results:
    """Reads the results, of `scale` those of the machine and commit that ran the most shapes.

    Raises:
        ValueError: if `scale`, or the products of `head` on its machine, have not been measured.
    """
    every = all_runs(folder)
    whole = [r for r in every if set(PROVIDERS) <= set(r.rows)]
    scale = list({(r.machine, r.commit, r.shape): r for r in whole if r.case == "scale"}.values())
    if scale:
        scale = largest(scale, lambda r: (r.machine, r.commit))
    head = [
        r
        for r in last_runs(every, ["products"])
        if r.case == "head" and "head=frozen" in r.shape and r.dtype == "float32"
        if scale and r.machine == scale[0].machine
    ]
    if not head:
        raise ValueError(
            f"{folder}: run `python -m benchmarks.run scale` and `... head` first, on one machine"
        )
    work = 4.0 * math.prod(int(size_in(head[0], key)) for key in "MHV")
    product = head[0].figure("products", "median_s") / work
    rates = {name: fit(scale, name, product) for name in PROVIDERS}
    last = max(scale, key=lambda r: r.date)
    when = f"commit {last.commit}, {last.day}"
    long = [r for r in last_runs(whole) if r.case == "long"]
    host = [r for r in every if r.case == "host" and {"trainer", "compact"} <= set(r.rows)]
    host.sort(key=lambda r: r.date)
    return Results(
        {Work.of(r.shape): r for r in scale},
        rates,
        last.machine,
        when,
        sorted(long, key=lambda r: (size_in(r, "data") != "synthetic", int(size_in(r, "L")))),
        [r for r in host if (r.commit, r.machine) == (host[-1].commit, host[-1].machine)],
        [r for r in last_runs(whole) if r.case == "step"],
    )


def size_in(one: Run, key: str) -> str:
    """Returns one size of a run's shape."""
    return dict(part.split("=") for part in one.shape.split(","))[key]
