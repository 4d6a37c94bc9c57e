"""The page on a run and on several, without a browser: what is in it, what is refused, what damage does to it."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest

from conftest import ROOT, metrics, script
from stepladder.evaluation import comparison
from stepladder.evaluation.comparison import Side
from stepladder.evaluation.held_out import RowLoss
from stepladder.evaluation.questions import Answer, Question
from stepladder.reporting import markdown, page, runs
from stepladder.reporting.curves import judge_curves
from stepladder.reporting.series import Curve

HOSTILE = (
    "</script></style></title></textarea><script>document.title='owned'</script>"
    "<img src=x onerror=document.title='owned'>"
    '" onfocus="document.title=\'owned\'" autofocus <a href="data:text/html,<script>1</script>">{{ 7*7 }} & \u202e é 😀'
)


class Text(HTMLParser):
    """The text that a browser shows, and the elements that it makes."""

    def __init__(self, source: str):
        super().__init__()
        self.shown, self.tags, self.attributes = "", [], set()
        self.feed(source)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data: str) -> None:
        if not self.tags or self.tags[-1] not in ("script", "style"):
            self.shown += data


def sft(folder: Path, tiny: Path, train: Path, evaluation: Path, rate: float, steps: int) -> Path:
    """A real run through the command line."""
    keys = {
        "model_name_or_path": str(tiny), "dataset_name": str(train), "eval_dataset_name": str(evaluation),
        "learning_rate": rate, "lr_scheduler_type": "constant", "max_steps": steps, "global_batch_size": 8,
        "per_device_train_batch_size": 8, "bf16": False, "logging_steps": 1, "eval_strategy": "steps",
        "eval_steps": 8, "save_strategy": "no",
    }  # fmt: skip
    (folder / "r.yaml").write_text(json.dumps(keys))
    done = script("sft", "--recipe", folder / "r.yaml", "--output_dir", folder / "run", OMP_NUM_THREADS="1")
    assert done.code == 0, done
    return folder / "run"


@pytest.fixture(scope="session")
def trained(tiny: Path, learnable: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One answer to all questions, learned by heart; the evaluation rows are the trained ones."""
    return sft(tmp_path_factory.mktemp("trained"), tiny, learnable, learnable, 0.02, 24)


@pytest.fixture
def copy(trained: Path, tmp_path: Path):
    """A copy of the run that a test may damage."""

    def make(name: str = "copy", **facts) -> Path:
        folder = tmp_path / name
        shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*", "report.html"))
        manifest = json.loads((folder / "run.json").read_text()) | facts
        (folder / "run.json").write_text(json.dumps(manifest))
        return folder

    return make


def answered(folder: Path, questions: list[str], *answers: list[str]) -> None:
    """compare.json as compare.py writes it."""
    asked = [Question([{"role": "user", "content": question}], "a reference") for question in questions]
    sides = [
        Side(f"side {number}", [Answer(text, True) for text in texts], [RowLoss(250 - 100 * number, 100)])
        for number, texts in enumerate(answers)
    ]
    facts = comparison.tabulate(sides, asked, []) | {"verdicts": comparison.judge_sides(sides, asked, {}), "notes": []}
    (folder / "compare.json").write_text(json.dumps(facts))


def text_of(file: Path) -> Text:
    return Text(file.read_text())


def png_size(file: Path) -> tuple[int, int]:
    """Width and height of a PNG whose check sums and pixels are whole."""
    data, chunks = file.read_bytes(), {}
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    at = 8
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        chunks[kind], at = body, at + 12 + length
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    assert len(zlib.decompress(chunks[b"IDAT"])) == height * (1 + 3 * width)
    return width, height


def test_a_run_leaves_its_page_and_picture(trained: Path) -> None:
    """Guards what sft.py writes at the end, with verdicts that fit what the run really did."""
    seen = text_of(trained / "report.html")
    facts = json.loads((trained / "run.json").read_text())
    rows = [row for row in metrics(trained) if "loss" in row]
    for part in (f"{rows[0]['loss']:.4f} → {rows[-1]['loss']:.4f}", f"{facts['parameters']['trainable']:,}",
                 facts["datasets"][0]["sha256"], facts["recipe_hash"], facts["packages"]["torch"], "finished",
                 "learning_rate", f"python scripts/sft.py --recipe {trained}/recipe.yaml"):  # fmt: skip
        assert part in seen.shown, part
    assert rows[-1]["loss"] < 0.1, "the run was made to learn its rows by heart"
    assert "memorized" in seen.shown and "known by heart" in seen.shown
    assert png_size(trained / "loss.png") == (960, 480)
    heads = [tag for tag in seen.tags if tag in ("h1", "h2", "h3")]
    assert heads[:2] == ["h1", "h2"] and heads.count("h1") == 1
    assert "Plan and measure" in seen.shown and "Peak memory a rank" in seen.shown
    # The audit of the data is the run's own: the rows that it is evaluated on are those that it is trained on.
    assert "exact copies of trained rows" in seen.shown and "output characters" in seen.shown


@pytest.mark.parametrize(
    ("rate", "told", "not_told"),
    [(5.0, {"diverged"}, {"converged", "generalizes"}), (0.005, {"still falling", "generalizes"}, {"diverged"})],
)
def test_a_run_that_really_diverges_is_told_from_one_that_learns(
    rate: float, told: set, not_told: set, tiny: Path, tmp_path: Path
) -> None:
    """Guards the verdicts on curves that training made, not a formula: a learning rate far too high, and a good one."""
    run = sft(tmp_path, tiny, ROOT / "data/techco.jsonl", ROOT / "data/techco_eval.jsonl", rate, 40)
    found = {verdict.name for verdict in page.judge_run(runs.read(run))}
    assert told <= found and not not_told & found, found
    assert all(name in text_of(run / "report.html").shown for name in told)


def test_a_comparison_of_no_runs_speaks_of_no_run(tmp_path: Path) -> None:
    """Guards the page of two models that are no run folders: no status, no steps, no recipe that is not there."""
    facts = {"questions": ["q"], "references": [""], "metrics": [], "verdicts": [],
             "command": "python scripts/compare.py --base 'a b' --tuned c",
             "sides": [{"name": name, "answers": ["x"]} for name in ("a b", "c")]}  # fmt: skip
    seen = Text(page.render_comparison(tmp_path, [tmp_path / "c"], facts)).shown
    assert facts["command"] in seen and "recipe.yaml" not in seen and "unknown" not in seen and "Steps" not in seen


def test_commands_on_the_page_can_be_pasted(copy) -> None:
    """Guards folders with spaces, and the comparison's own command beside the run's."""
    folder = copy("my run")
    answered(folder, ["q"], ["a"], ["b"])
    facts = json.loads((folder / "compare.json").read_text()) | {"command": "python scripts/compare.py --base x"}
    (folder / "compare.json").write_text(json.dumps(facts))
    seen = Text(page.render_page([runs.read(folder)])).shown
    assert f"--recipe '{folder}/recipe.yaml'" in seen and facts["command"] in seen


def test_the_page_asks_for_nothing(trained: Path) -> None:
    """Guards self-containment: no address in it, and a policy that allows its own script and style alone."""
    source = (trained / "report.html").read_text()
    assert not re.search(r"""(src|href)=|@import|url\((?!#)|https?://(?!www\.w3\.org/2000/svg)""", source)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', source).group(1)
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy


def test_several_runs_are_compared(copy, tmp_path: Path) -> None:
    """Guards the comparison: what differs is marked, what does not is not, and curves' differences are figures."""
    first, second = copy("one"), copy("two")
    facts = json.loads((second / "run.json").read_text())
    facts["recipe"] |= {"learning_rate": 0.5, "output_dir": "elsewhere"}
    facts |= {"strategy": "zero2", "world_size": 2}
    (second / "run.json").write_text(json.dumps(facts))
    rows = metrics(second)
    rows[3]["loss"] += 0.25
    (second / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = script("report", first, second, copy("three"), "-o", tmp_path / "page.html", "--json")
    assert done.code == 0, done
    told = json.loads(done.out)
    assert [d["run"] for d in told["differences"]] == ["two", "three"]
    assert [d["the same curve (fp32)"] for d in told["differences"]] == ["no", "yes"]
    assert told["differences"][0]["largest difference of the loss"] == "0.25"
    assert all(run["verdicts"] for run in told["runs"])
    source = (tmp_path / "page.html").read_text()
    differing = re.findall(r'<tr class="differs"><th scope="row">([\w ]+)', source)
    assert {"learning_rate", "strategy", "world size"} <= set(differing), differing
    assert not {"output_dir", "max_steps", "seed", "torch", "started"} & set(differing), differing
    run_again = "accelerate launch --config_file accelerate_configs/zero2.yaml --num_processes 2 scripts/sft.py"
    assert run_again in Text(source).shown


def test_answers_stand_side_by_side_with_their_differences(copy) -> None:
    folder = copy()
    answered(folder, ["Where is my order?"], ["Your order is lost."], ["Your order is on its way."])
    page.write_page(folder)
    source = (folder / "report.html").read_text()
    assert "Your order is <del>lost</del>." in source and "Your order is <ins>on its way</ins>." in source
    assert "side 0" in source and "a reference" in source


def test_prediction_and_audit_are_shown_where_they_lie(copy) -> None:
    folder = copy(plan={"peak_memory_bytes": 3 * 2**30})
    found = {"severity": "warning", "name": "private", "what": "e-mail addresses in 2 rows", "where": ["d.jsonl:7"]}
    figure = {"severity": "figure", "name": "languages", "what": "languages", "figures": {"en": 1.0}}
    (folder / "audit.json").write_text(json.dumps({"findings": [found, figure]}))
    page.write_page(folder)
    seen = text_of(folder / "report.html").shown
    assert "3.00 GiB" in seen and "e-mail addresses in 2 rows" in seen and "d.jsonl:7" in seen


def test_hostile_text_is_text(copy, tmp_path: Path) -> None:
    """Guards every way from models, data and recipes into the page: nothing of it becomes an element."""
    harmless, hostile = copy("harmless"), copy("hostile", strategy=HOSTILE, status="failed", error=HOSTILE)
    answered(harmless, ["q"], ["one"], ["two"])
    answered(hostile, [HOSTILE], [HOSTILE], ["two" + HOSTILE])
    facts = json.loads((hostile / "run.json").read_text())
    facts["recipe"] |= {HOSTILE: HOSTILE, "nested": [{HOSTILE: HOSTILE}]}
    facts["datasets"][0]["name"] = HOSTILE
    facts["packages"] = {HOSTILE: HOSTILE}
    (hostile / "run.json").write_text(json.dumps(facts))
    (hostile / "audit.json").write_text(json.dumps({"findings": [
        {"severity": HOSTILE, "what": HOSTILE, "where": [HOSTILE], "figures": {HOSTILE: 1}}]}))  # fmt: skip
    (harmless / "audit.json").write_text('{"findings": [{"severity": "warning", "what": "?", "where": ["1"]}]}')
    named = tmp_path / "<img src=x onerror=1>&\"'"
    hostile.rename(named)
    page.save(tmp_path / "page.html", page.render_page(runs.read_all([named])))
    page.write_page(harmless)
    seen, clean = text_of(tmp_path / "page.html"), text_of(harmless / "report.html")
    assert set(seen.tags) <= set(clean.tags) | {"aside"}, set(seen.tags) - set(clean.tags)
    assert seen.tags.count("script") == clean.tags.count("script") == 2
    assert seen.attributes <= clean.attributes, seen.attributes - clean.attributes
    assert HOSTILE in seen.shown and "49 &" not in seen.shown


@pytest.mark.parametrize(
    ("damage", "remark"),
    [
        (lambda f: (f / "metrics.jsonl").write_text((f / "metrics.jsonl").read_text()[:-20]), "is cut short"),
        (lambda f: (f / "metrics.jsonl").write_text("\x00\xff{]\n" + (f / "metrics.jsonl").read_text()), "at line 1"),
        (lambda f: (f / "metrics.jsonl").write_text("[1]\n3\nnull\n{}\n"), "at line 1, 2, 3, 4"),
        (lambda f: (f / "metrics.jsonl").write_text(""), "no metrics yet"),
        (lambda f: (f / "metrics.jsonl").unlink(), "metrics.jsonl is missing"),
        (lambda f: (f / "run.json").unlink(), "run.json is missing"),
        (lambda f: (f / "run.json").write_text('{"status": "fin'), "run.json cannot be read"),
        (lambda f: (f / "run.json").write_text("[" * 100_000), "it is nested too deeply"),
        (lambda f: (f / "run.json").write_text('{"a": ' * 200 + "1" + "}" * 200), "it is nested too deeply"),
        (lambda f: (f / "run.json").write_text('{"totals": {"steps": "x"}}'), "totals in another form"),
        (lambda f: (f / "metrics.jsonl").open("a").write("[" * 100_000 + "\n"), "is damaged at line"),
        (lambda f: (f / "metrics.jsonl").write_text(f'{{"step": 1{"0" * 400}}}\n{{"step": 1, "loss": 1{"0" * 400}}}\n'),
         "at line 1: left out"),
        (lambda f: (f / "run.json").write_text('{"status": "running", "totals": {}, "parameters": []}'), "running"),
        (lambda f: (f / "run.json").write_text('{"status": "failed", "error": "CUDA out of memory"}'), "CUDA out of"),
        (lambda f: (f / "compare.json").write_text('{"sides": [{"name": "a", "answers": [1]}]}'), "compare.json does"),
    ],
)  # fmt: skip
def test_a_damaged_run_is_shown_as_far_as_it_goes(damage, remark, copy) -> None:
    """Guards the page against what a crash leaves behind: it is made, and says what is amiss."""
    folder = copy()
    damage(folder)
    done = script("report", folder)
    assert done.code == 0 and remark in done.out and "Traceback" not in done.err, done
    seen = text_of(folder / "report.html")
    assert remark in seen.shown and "In short" in seen.shown


def test_a_diverged_run_is_shown(copy) -> None:
    """Guards against NaN in the embedded JSON, which no browser reads."""
    folder = copy()
    rows = metrics(folder)
    for row in rows[12:]:
        row |= {key: math.nan for key in ("loss", "grad_norm", "eval_loss") if key in row}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page.write_page(folder)
    source = (folder / "report.html").read_text()
    embedded = re.search(r'id="logged">(.*?)</script>', source).group(1)
    assert json.loads(embedded, parse_constant=pytest.fail)[0]["line"]["loss"][-1] is None
    assert "diverged" in Text(source).shown and png_size(folder / "loss.png")


@pytest.mark.parametrize("words", [["no-such-folder"], ["data"], ["README.md"]])
def test_what_is_no_run_is_refused(words) -> None:
    done = script("report", *words)
    assert done.code == 2 and done.err.startswith("✘ run: ") and "run.json" in done.err, done
    assert "Traceback" not in done.err


def test_several_runs_need_a_place_and_each_once(copy, tmp_path: Path) -> None:
    first = copy()
    done = script("report", first, copy("two"))
    assert done.code == 2 and "-o" in done.err, done
    done = script("report", first, first, "-o", tmp_path / "page.html")
    assert done.code == 2 and "given twice" in done.err, done


def test_an_unwritable_place_is_named(copy, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = copy()
    (tmp_path / "folder").mkdir()
    said = {
        tmp_path / "file/page.html": "cannot be written",
        tmp_path / "folder": "cannot be written",
        "": "it is empty",
    }
    for place, words in said.items():  # the last is `-o "$UNSET"`
        done = script("report", run, "-o", place)
        assert done.code == 2 and words in done.err and "Traceback" not in done.err, done
    assert not list(tmp_path.glob(".*.part")), "half a page is left"


def test_long_curves_are_summed_up_in_their_table(tmp_path: Path) -> None:
    """Guards the size of a page: ten thousand steps make no table of ten thousand rows."""
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": n, "loss": 1 + 1 / n, "grad_norm": 1.0}) + "\n" for n in range(1, 10_001))
    )
    run = runs.read(tmp_path)
    source = page.render_page([run])
    assert len(source) < 400_000 and source.count("<tr>") < 100
    assert judge_curves(run.curve("loss"), Curve(), Curve())


def test_odd_values_still_make_a_page(copy) -> None:
    """Guards against a page that one unexpected value in run.json or audit.json prevents."""
    folder = copy()
    whole = json.loads((folder / "run.json").read_text()) | {"plan": {"peak_memory_bytes": 1}}
    for odd in (None, 3, "x", ["x"], {"x": "y"}, 10**400, float("inf")):
        for key in whole:
            keys = whole[key] if isinstance(whole[key], dict) else {}
            for value in (odd, *({**keys, inner: odd} for inner in keys)):
                (folder / "run.json").write_text(json.dumps(whole | {key: value}))
                logged = runs.read(folder)
                assert "Run it again" in page.render_page([logged])
                assert runs.side_by_side([logged]) and markdown.mini_project_report(logged, "any")
        (folder / "run.json").write_text(json.dumps(whole))
        for audit in (odd, {"findings": odd}, {"findings": [odd]}, {"findings": [{"figures": odd, "where": odd}]}):
            (folder / "audit.json").write_text(json.dumps(audit))
            assert "Run it again" in page.render_page([runs.read(folder)])


def test_the_mini_project_is_filled_in(copy) -> None:
    """Guards the workshop's last exercise: every heading of its template, with figures of this run under it."""
    folder = copy()
    done = script("report", folder, "--project", "Doors | owls")
    assert done.code == 0, done
    bare = (folder / "mini_project_report.md").read_text()
    assert "Domain: Doors | owls" in bare and "Not compared yet" in bare and "**No**" in bare  # learned by heart
    assert "- warning: exact copies of trained rows" in bare, "what the audit of its data found"
    assert "- figure:" not in bare, "nor what is no finding"
    answered(folder, ["Which door?\nThis | one?", "Who?"], ["none", "me"], ["the third", "an owl"])
    compared = (folder / "compare.json").read_text().replace("side 1", "side | 1")
    (folder / "compare.json").write_text(compared)
    done = script("report", folder, "--project", "Doors")
    text = (folder / "mini_project_report.md").read_text()
    for heading in ("Dataset", "Training configuration", "Results", "Evaluation", "Learnings", "Production readiness"):
        assert text.split(f"## {heading}\n\n")[1].split("\n## ")[0].strip(), heading
    assert "8 examples" in text and "Learning rate: 0.02" in text and "> an owl" in text and "| held-out loss |" in text
    assert "**Which door? This | one?**" in text
    table = [line.replace("\\|", "") for line in text.splitlines() if line.startswith("|")]
    assert "side \\| 1" in text and {line.count("|") for line in table} == {5}, "a bar in a name is no column"


LEARNED = {"severity": "good", "name": "better than the base", "what": "It is.", "evidence": "1 before, 0.5 after"}
JUDGED = {"name": "facts", "better": "higher", "unit": "share of answers", "facts": True, "required": 0.95,
          "sides": [{"mean": 1.0}, {"mean": 1.0}], "tests": [None, None], "winner": "-"}  # fmt: skip


def verdict(severity: str, name: str) -> dict[str, str]:
    return {"severity": severity, "name": name, "what": "It does.", "evidence": f"seen: {name}"}


@pytest.mark.parametrize(
    ("steps", "evaluated", "more", "rows", "answer", "named"),
    [
        (200, 0.1, [], [JUDGED], "To a trial", []),
        (200, 0.1, [], [], "Not yet", ["facts not judged"]),
        (4, 0.1, [], [JUDGED], "Not yet", ["too short (4 logged losses"]),
        (200, None, [], [JUDGED], "Not yet", ["not evaluated"]),
        (200, 0.9, [], [JUDGED], "Not yet", ["gap"]),
        (200, 0.1, [verdict("look", "gap")], [JUDGED], "Not yet", ["gap (seen: gap)"]),
        (
            200,
            0.1,
            [verdict("fault", "requirement missed")],
            [],
            "No",
            ["seen: requirement missed", "facts not judged"],
        ),
    ],
)
def test_what_lowers_a_recommendation_is_named_in_it(steps, evaluated, more, rows, answer, named) -> None:
    """Guards `Would I deploy this?` against a yes for four steps of random weights, or for answers nobody checked."""
    fell = {step: 1.5 + 2 * math.exp(-step / 30) for step in range(1, steps + 1)}
    logged = {"loss": Curve([*fell], [*fell.values()]), "grad_norm": Curve([*fell], [1.0] * steps)}
    if evaluated is not None:
        logged["eval_loss"] = Curve((steps // 2, steps), [fell[step] + evaluated for step in (steps // 2, steps)])
    other = {"side": "runs/other", "verdicts": [verdict("fault", "worse than the base")]}
    sides = [{"name": name, "answers": ["a"]} for name in ("base", "runs/mine")]
    comparison = {"questions": ["q"], "references": [""], "sides": sides, "metrics": rows,
                  "verdicts": [{"side": "runs/mine", "verdicts": [LEARNED, *more]}, other]}  # fmt: skip
    run = runs.LoggedRun(Path("runs/mine"), "mine", curves=logged, last_step=steps, comparison=comparison)
    text = markdown.mini_project_report(run, "any")
    line = next(line for line in text.splitlines() if line.startswith("Would I deploy this?"))
    assert f"**{answer}" in line and all(part in line for part in named) and "worse" not in line, line


def test_peak_memory_over_time_is_drawn_where_it_is_logged(copy) -> None:
    folder = copy()
    rows = [row | {"peak_memory_bytes": 3 * 2**29} for row in metrics(folder)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert script("report", folder).code == 0
    seen = text_of(folder / "report.html").shown
    assert "Peak memory" in seen and "1.5 at step 1" in seen


def luminance(colour: str) -> float:
    """Relative luminance, by the formula of WCAG 2.2."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_and_curves_stand_out() -> None:
    """Guards those who see little, and paper: WCAG asks for 4.5 between text and its ground, and for 3 of a curve."""
    css = (ROOT / "src/stepladder/reporting/page.css").read_text()
    pairs = dict(re.findall(r"--(\w+): light-dark\((#\w{6}, #\w{6})\)", css))
    curves = re.findall(r"\.s\d { --c: light-dark\((#\w{6}, #\w{6})\)", css)
    assert len(curves) == 6
    for shade in (0, 1):
        grounds = [luminance(pairs[name].split(", ")[shade]) for name in ("paper", "raised")]
        for least, colours in ((4.5, [pairs[name] for name in ("ink", "soft", "accent")]), (3, curves)):
            for colour in colours:
                seen = luminance(colour.split(", ")[shade])
                ratio = min(
                    (max(seen, ground) + 0.05) / (min(seen, ground) + 0.05)
                    for ground in grounds[: 1 if least == 3 else 2]
                )
                assert ratio >= least, (colour, shade, ratio)
