"""`compact report`: the page in a real browser, what it says, runs that lack parts, bad input."""

import itertools
import json
import re
import shutil

import numpy as np
import pytest

from compact.commands.cli import main
from compact.data import load_problems
from compact.files import content_of_student
from compact.metrics import AXES
from compact.report import charts
from compact.report import curves as curves_module
from compact.report import run as run_module
from compact.report import views as views_module

# Runs inside the browser: what a reader would see, measured after layout.
PROBE = """<script>
addEventListener("load", () => {
  const seen = e => { const r = e.getBoundingClientRect(); return r.width > 1 && r.height > 1 };
  const all = s => [...document.querySelectorAll(s)];
  const style = e => getComputedStyle(e);
  document.title = JSON.stringify({
    overflow: document.documentElement.scrollWidth - innerWidth,
    wide: all("main *").filter(e => !e.closest(".scroll") && !e.closest("svg")
      && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.className),
    charts: all("svg.chart").filter(seen).length,
    labels: all("svg.chart").map(e => e.getAttribute("aria-label")),
    nodes: all("svg .node").filter(seen).length,
    matches: all("svg .match").length,
    onPath: all("svg .node.main circle").map(e => style(e).fill).filter(f => f != "none").length,
    seeds: all("#arms svg .point").filter(seen).length,
    lines: all("svg .line").filter(seen).length,
    lineColours: [...new Set(all("#weights .line").map(e => style(e).stroke))],
    smallest: Math.min(...all("svg text").map(e => e.getBoundingClientRect().height)),
    columns: style(document.querySelector("#weights .grid")).gridTemplateColumns.split(" ").length,
    gained: all(".text .gain").filter(e => style(e).backgroundColor != "rgba(0, 0, 0, 0)").length,
    lost: all(".text .loss").filter(e => style(e).backgroundColor != "rgba(0, 0, 0, 0)").length,
    headings: all("h2").filter(seen).map(e => e.innerText),
    tables: all("table").map(e => e.innerText),
    problems: all(".problem").map(e => e.innerText),
    resources: performance.getEntriesByType("resource").map(e => e.name),
  });
});
</script></body>"""


@pytest.fixture(scope="session")
def page(run_folder):
    assert main(["report", str(run_folder), "--problems", "2"]) == 0
    return run_folder / "report.html"


@pytest.fixture
def seen(page, browse, tmp_path):
    """Returns what the browser shows of the page at a width."""

    def look(width):
        probed = tmp_path / "probed.html"
        probed.write_text(page.read_text().replace("</body>", PROBE))
        found = re.search(r"<title>(\{.*?\})</title>", browse(probed, "--dump-dom", width=width))
        assert found, "the page did not load"
        return json.loads(found[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))

    return look


def test_page_in_a_browser(seen):
    shown = seen(1240)
    assert shown["headings"] == ["Weights", "Scores", "Learning", "Forgetting", "Arms", "Problems"]
    assert shown["resources"] == [], "the page must not load anything"
    assert shown["overflow"] <= 0 and shown["wide"] == []
    assert shown["columns"] == 2
    assert shown["charts"] == len(shown["labels"]) >= 12, shown["labels"]
    assert len(shown["lineColours"]) == 4, "each teacher has its own colour"
    assert shown["smallest"] > 10, "text in charts is too small to read"
    teachers = shown["tables"][0].splitlines()
    good = next(line for line in teachers if line.startswith("good")).split()
    assert good[1:3] == ["12", "40"]  # problems, tokens
    assert float(good[3]) == pytest.approx(0.4, abs=0.03)  # mean weight
    assert good[6] == "1.000"  # validity
    assert any(line.startswith("<unrelated & odd>") for line in teachers), "text is escaped"
    assert "KL 0.0321 nats per token" in shown["tables"][1]
    assert "drop +0.100 (-0.050 to +0.250)" in shown["tables"][1]
    assert re.search(r"robust\s+0\.530\s+0\.480 – 0\.580\s+\+0\.420", shown["tables"][2])
    assert re.search(r"robust\s+0\.750\s+0\.250", shown["tables"][3]), "shares of the teachers"
    assert shown["seeds"] == 3 * 2, "each seed of each arm is a ring"


def test_problems_show_coloured_tokens_steps_and_answers(seen):
    shown = seen(1240)
    assert len(shown["problems"]) == 2
    for text in shown["problems"]:
        assert "zoo-4-" in text and "Gold answer" in text and "weight 0." in text
        assert "validity 1.00" in text and "validity 0.00" in text
        assert "✓" in text and "✗" in text, "right and wrong answers are marked"
        assert re.search(r"[+-]\d+\.\d\d", text), "steps show their gain"
    assert shown["labels"].count("Consensus graph of the steps") == 2
    assert shown["nodes"] >= 2 * 4 * 2, "every step of every teacher is a node"
    assert shown["matches"] >= 2 and shown["onPath"] >= 2, "teachers who agree are joined"
    assert shown["gained"] > 20 and shown["lost"] > 20


def test_page_on_a_phone(seen):
    shown = seen(390)
    assert shown["overflow"] <= 0 and shown["wide"] == [], "the page must not scroll sideways"
    assert shown["columns"] == 1
    assert shown["smallest"] > 8


def test_screenshot_is_no_blank_page(page, browse, tmp_path):
    from PIL import Image

    picture = tmp_path / "page.png"
    browse(page, f"--screenshot={picture}", width=1240)
    colours = Image.open(picture).convert("RGB").getcolors(1 << 20)
    assert len(colours) > 100
    assert max(count for count, _ in colours) < 0.95 * 1240 * 1000


def test_no_address_outside_the_page(page):
    text = page.read_text()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", text)
    assert "@import" not in text and "url(" not in text and "<script" not in text
    assert len(text) < 1_000_000


def copy(run_folder, tmp_path, *absent):
    run = tmp_path / "run"
    shutil.copytree(run_folder, run, ignore=shutil.ignore_patterns("report.html", *absent))
    return run


def test_run_without_student_says_so_on_the_page(run_folder, tmp_path, capsys):
    run = copy(run_folder, tmp_path, "config.json", "compare.json", "*.summary.json", "run.json")
    info = {"data": json.loads((run_folder / "run.json").read_text())["data"]}
    (run / "run.json").write_text(json.dumps(info))
    assert main(["report", str(run)]) == 0
    assert "No problems are shown: the run has not saved a student yet." in capsys.readouterr().out
    text = (run / "report.html").read_text()
    assert "the run has not saved a student yet" in text
    assert 'id="weights"' in text and 'id="arms"' not in text and 'id="forgetting"' not in text


def test_a_student_that_cannot_be_loaded_is_told_on_the_page(
    run_folder, tmp_path, monkeypatch, capsys
):
    """Its number format is that of the run."""
    run = copy(run_folder, tmp_path)
    info = json.loads((run / "run.json").read_text())
    info["settings"]["model_init_kwargs"] = {"dtype": "bfloat16", "trust_remote_code": False}
    (run / "run.json").write_text(json.dumps(info))
    asked = []

    def load_model(name, dtype=None):
        asked.append(dtype)
        raise RuntimeError("not enough memory: you tried to allocate 9 bytes.\nMore of torch")

    monkeypatch.setattr(run_module, "load_model", load_model)
    assert main(["report", str(run)]) == 0
    told = "No problems are shown: the student cannot be loaded (not enough memory: you tried to"
    assert told in capsys.readouterr().out and told in (run / "report.html").read_text()
    assert "--problems 0 leaves them out" in (run / "report.html").read_text()
    assert asked == ["bfloat16"]
    question = load_problems(info["data"])[0].question_id
    assert main(["report", str(run), "--question_id", question]) == 1
    assert "the student cannot be loaded" in capsys.readouterr().err


def test_the_tile_has_the_accuracy_of_the_students_own_evaluation(tmp_path):
    """Not that of its base, although it is newer."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"student")
    counts = {"correct": 1, "items": 2, "ci_low": 0.0, "ci_high": 1.0}
    mine = {"accuracy": 0.25, "settings": {"weights": content_of_student(tmp_path)}} | counts
    base = {"accuracy": 0.75, "settings": {"weights": "0" * 64}} | counts
    run = run_module.Run(tmp_path, evaluations=[("mine", mine), ("mine.old.base", base)])
    assert views_module.tiles(run) == [("25.0%", "accuracy (mine)")]
    ((_, text, _),) = curves_module.learning_charts(run)
    assert text.endswith("Not of this student, or not known to be: mine.old.base.")
    assert views_module.tiles(run_module.Run(tmp_path, evaluations=[("base", base)])) == []


def test_problems_show_the_texts_that_a_strategy_wrote(run_folder, tmp_path, capsys):
    """Training read them, and their weights stand beside them."""
    run = copy(run_folder, tmp_path)
    info = json.loads((run / "run.json").read_text()) | {"strategy": "orion"}
    (run / "run.json").write_text(json.dumps(info))
    problems = load_problems(info["data"])[:2]
    count = len(problems[0].rationales)
    written = [{"question_id": problems[0].question_id, "completions": [None] * (count - 1)}]
    (run / "orion.jsonl").write_text(json.dumps(written[0]) + "\n")
    found = run_module.read_run(run)
    assert run_module.as_trained(found, problems) == problems  # of other data
    written[0]["completions"] = [None] * (count - 1) + ["She has 2 . \nThe answer is 2"]
    (run / "orion.jsonl").write_text(json.dumps(written[0]) + "\n")
    trained = run_module.as_trained(found, problems)
    assert trained[1] == problems[1] and trained[0].rationales[:-1] == problems[0].rationales[:-1]
    assert trained[0].rationales[-1].completion == written[0]["completions"][-1]
    run_module.look_into(found, problems=1, question_ids=[problems[0].question_id])
    assert found.notes == ["The problems have the rationales that orion wrote for them."]
    assert found.explained[0].rationales[-1].answer == "2"


@pytest.mark.parametrize("steps", [2, 15, 60])
def test_nodes_of_a_graph_of_many_steps_do_not_overlap(steps):
    nodes = [charts.Node(r, c, 1.0, False, "a", "a", False) for r in (0, 1) for c in range(steps)]
    drawn = charts.consensus_chart("graph", [("x", 0), ("y", 1)], nodes, [])
    found = re.findall(r'<circle cx="([\d.]+)" cy="[\d.]+" r="([\d.]+)"', drawn)
    places = sorted({float(x) for x, _ in found})
    pitch = min(b - a for a, b in itertools.pairwise(places))
    assert len(places) == steps and 2 * max(float(r) for _, r in found) < pitch
    assert ('class="step"' in drawn) == (steps == 2)
    assert places[-1] < charts.WIDTH


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (0.0, 1.0, ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0.0, 0.5, ["0", "0.1", "0.2", "0.3", "0.4", "0.5"]),
        (1.00001, 1.00003, ["1.000010", "1.000015", "1.000020", "1.000025", "1.000030"]),
        (12_340, 12_380, ["12.34k", "12.35k", "12.36k", "12.37k", "12.38k"]),
        (0, 4e-5, ["0", "1e-05", "2e-05", "3e-05", "4e-05"]),
        (-20, 40, ["-20", "0", "20", "40"]),
        (3.0, 3.0, ["3"]),
        (0.0, 0.0, ["0"]),
    ],
)
def test_numbers_of_an_axis_differ(low, high, shown):
    assert charts.labels(charts.ticks(low, high)) == shown


@pytest.mark.parametrize("values", [[1.0], [1.0 + 2e-7, 1.0 + 1e-7], [1.5, 2.0], [0.0], [1e-12]])
def test_an_axis_is_never_empty(values):
    points = [(float(i), v) for i, v in enumerate(values)]
    for limits in ((None, None), (None, 1.0), (2.0, None), (1.0, 1.0)):
        low, high = charts._range(values, limits)
        assert high - low > 1e-7
        line = [charts.Series("x", 0, points)]
        drawn = charts.line_chart("t", line, x_label="x", y_range=limits)
        found = re.findall(r'text-anchor="end">([^<]+)<', drawn)
        assert len(found) > 1 and len(set(found)) == len(found)


def test_run_in_progress_and_newest_checkpoint(run_folder, tmp_path):
    run = copy(run_folder, tmp_path, "config.json", "trainer_state.json", "compare.json")
    for step, loss in ((9, 1.0), (30, 0.5)):
        (run / f"checkpoint-{step}").mkdir()
        history = {"log_history": [{"step": step, "loss": loss}]}
        (run / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(history))
        shutil.copy(run_folder / "config.json", run / f"checkpoint-{step}")
    found = run_module.read_run(run)
    assert run_module.logged(found, "loss") == [(30.0, 0.5)]
    assert run_module.student_folder(run).name == "checkpoint-30"


def test_arms_alone_make_a_page(run_folder, tmp_path):
    run = tmp_path / "compare"
    run.mkdir()
    shutil.copy(run_folder / "compare.json", run)
    assert main(["report", str(run), "--out", str(tmp_path / "deep" / "page.html")]) == 0
    text = (tmp_path / "deep" / "page.html").read_text()
    assert 'id="arms"' in text and 'id="weights"' not in text and "accuracy of oracle" in text


def test_an_arm_of_one_seed_has_no_interval(run_folder, tmp_path):
    arms = json.loads((run_folder / "compare.json").read_text())
    for arm in arms["arms"]:
        arm |= {"seeds": [0], "values": [arm["mean"]], "ci_low": 0.0, "ci_high": 1.0}
        if "gain" in arm:
            arm |= {"gain_low": -1.0, "gain_high": 1.0}
    (tmp_path / "compare.json").write_text(json.dumps(arms))
    assert main(["report", str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    assert text.count("one seed") == 3 and "+0.420" in text
    assert "1.000" not in text and "(-1.000" not in text
    for arm in arms["arms"]:
        ends = [name for name in arm if name.endswith(("_low", "_high"))]
        arm |= {"seeds": [0, 1], "values": [arm["mean"]] * 2} | dict.fromkeys(ends)
    (tmp_path / "compare.json").write_text(json.dumps(arms))
    assert main(["report", str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    assert text.count("equal seeds") == 3 and "+0.420" in text


def test_policy_without_scores(tmp_path):
    from compact.trainer.runlog import ScoreLog

    log = ScoreLog(tmp_path / "run")
    for step in (1, 2, 3):
        row = {"step": step, "question_id": "q", "tokens": 3, "nll": 1.0, "epoch": 0.0}
        log.append([row | {"teacher": t, "weight": 0.5} for t in ("a", "b")])
    log.close()
    assert main(["report", str(tmp_path / "run"), "--problems", "0"]) == 0
    text = (tmp_path / "run" / "report.html").read_text()
    assert "This policy does not use the three scores" in text and "nan" not in text


def test_a_run_of_problems_that_were_left_out(tmp_path):
    """As of a young `rejection` run: weights of 0, and texts that were not read."""
    from compact.trainer.runlog import ScoreLog

    log = ScoreLog(tmp_path / "run")
    for step in (1, 2, 3):
        row = {"step": step, "question_id": "q", "tokens": 3, "nll": float("nan"), "epoch": 0.0}
        log.append([row | {"teacher": t, "weight": 0.0} for t in ("a", "b")])
    log.close()
    (tmp_path / "run" / "checkpoint-2-backup").mkdir()
    assert main(["report", str(tmp_path / "run"), "--problems", "0"]) == 0
    text = (tmp_path / "run" / "report.html").read_text()
    assert "Mean weight of each teacher" in text and "Effective number" not in text
    assert "Likelihood by teacher" not in text


def test_problems_that_the_data_do_not_hold(run_folder, tmp_path, capsys):
    """As of a strategy that writes its own problems, or of data that were edited."""
    from compact.lab import zoo

    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(r) + "\n" for r in zoo.make_rows(("good",), 3, seed=77)))
    page = tmp_path / "page.html"
    assert main(["report", str(run_folder), "--data", str(other), "--out", str(page)]) == 0
    assert "holds none of the problems that the run has logged" in capsys.readouterr().out


def test_teachers_beyond_the_colours_have_other_lines(tmp_path):
    from compact.trainer.runlog import ScoreLog

    log = ScoreLog(tmp_path / "run")
    for step in (1, 2):
        row = {"step": step, "question_id": "q", "tokens": 3, "nll": 1.0, "epoch": 0.0}
        log.append([row | {"teacher": f"t{t}", "weight": 1 / 18} for t in range(18)])
    log.close()
    assert main(["report", str(tmp_path / "run"), "--problems", "0"]) == 0
    text = (tmp_path / "run" / "report.html").read_text()
    looks = re.findall(r'class="line (c\d[^"]*)"[^>]*><title>t\d+<', text)
    assert len(looks) == 36 and len(set(looks)) == 18 and "c0 dash2" in looks
    chips = re.findall(r'class="chip (c\d[^"]*)"', text)
    assert len(set(chips)) == 18


def test_numbers_behind_the_charts(run_folder):
    run = run_module.read_run(run_folder)
    starts = run_module.visits(run.scores)
    assert len(starts) == 61 and set((starts[1:] - starts[:-1]).tolist()) == {4}
    even = run_module.effective_teachers(np.array([0.25] * 4 + [1.0, 0, 0, 0]), [0, 4, 8])
    assert even.tolist() == pytest.approx([4.0, 1.0])
    # Weights that do not sum to 1, and a problem that was left out.
    odd = run_module.effective_teachers(np.array([0.05] * 4 + [0.0] * 4), np.array([0, 4, 8]))
    assert odd[0] == pytest.approx(4.0) and np.isnan(odd[1])
    step, value = np.arange(1.0, 401), np.arange(400.0)
    curve = curves_module.binned(step, value)
    assert len(curve) == curves_module.BINS
    assert [y for _, y in curve] == pytest.approx([x - 1 for x, _ in curve])
    known = set(run.scores["question_id"])
    decisive, *_, even = run_module.choose_problems(run, 12, known)
    weights = [
        sorted(v["weight"] for v in run_module.last_visit(run, q).values())
        for q in (decisive, even)
    ]
    assert weights[0][-1] > weights[1][-1]
    assert len(run_module.choose_problems(run, 100, known)) == 12
    assert run_module.choose_problems(run, 100, {even}) == [even]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("That is 26 - 10 = 16, and 16 - 10 = 6 pounds.", "16-10=6"),
        ("( 26.0 - 10.0 ) - 10.0 = 6.0", "(26-10)-10=6"),
        ("He has 3 apples, (2 + 3) x 4 = 20.", "(2+3)*4=20"),
        ("First find the weight.", "First find the"),
    ],
)
def test_a_node_is_named_by_its_equation(text, label):
    assert views_module.step_label(text) == label


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "absent: no such run folder"),
        (["empty"], "empty: expected the score log of a run (scores/) or compare.json"),
        (["RUN", "--problems", "-1"], "--problems must be at least 0, got -1"),
        (["RUN", "--problems", "x"], "invalid int value: 'x'"),
        (["RUN", "--problems", "2", "--question_id", "q"], "not allowed with argument --problems"),
        (["RUN", "--problems", "0", "--data", "x"], "--data must be used with problems to show"),
        (["arms", "--data", "x"], "problems to show, and arms has no score log"),
        (["arms", "--problems", "2"], "--problems must be used with a run, and arms has no score"),
        (["RUN", "--question_id", "nobody"], "holds no question_id 'nobody'"),
        (["RUN", "--data", "absent.jsonl", "--question_id", "q"], "absent.jsonl: no such file"),
        (["broken"], "run.json:2: expected JSON, got"),
    ],
)
def test_bad_input_is_one_line(arguments, message, run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "arms").mkdir()
    shutil.copy(run_folder / "compare.json", tmp_path / "arms")
    (tmp_path / "broken" / "run.json").write_text('{\n"a": oops}')
    words = [str(run_folder) if word == "RUN" else word for word in arguments]
    try:
        status = main(["report", *words])
    except SystemExit as exit:
        status = exit.code
    lines = capsys.readouterr().err.strip().splitlines()
    told = [line for line in lines if line.startswith("compact: error:")]
    assert status != 0 and len(told) == 1 and message in told[0]
    assert not any("Traceback" in line for line in lines)


def test_teachers_who_tie_share_the_first_place(tmp_path):
    """Two visits: one with three equal weights, one that a teacher wins."""
    scores = {
        "step": np.array([1, 1, 1, 2, 2, 2]),
        "question_id": np.array(["a", "a", "a", "b", "b", "b"]),
        "teacher": np.array(["x", "y", "z"] * 2),
        "weight": np.array([1 / 3, 1 / 3, 1 / 3 + 1e-9, 0.2, 0.6, 0.2]),
        **{name: np.ones(6) for name in ("tokens", "nll", *AXES)},
    }
    rows = views_module.teacher_table(run_module.Run(tmp_path, scores=scores))
    assert [round(row["first"], 6) for row in rows] == [0.166667, 0.666667, 0.166667]


def test_help_fits_a_screen_and_shows_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    text = capsys.readouterr().out
    assert "compact report runs/svamp" in text and len(text.splitlines()) <= 24
