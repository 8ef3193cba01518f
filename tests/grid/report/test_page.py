"""The page and the tables of a grid: what is in them, partial grids, hostile text, and a real browser."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks import grid_page
from benchmarks.grid_page import BROWSER
from capcur_jax.evaluation import errors, folders
from capcur_jax.grid.report import examples, gather, more, page
from capcur_jax.report.__main__ import main

DOCS = Path(__file__).parents[3] / "docs"
CHROMIUM = shutil.which("chromium")


def text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def test_tables_are_the_papers_and_say_what_is_missing(grid):
    said = text_of(grid / "tables.md")
    titles = re.findall("^## (.+)$", said, re.MULTILINE)
    for title in ("The paper's claims", "Table 1", "Table 2", "Figure 3", "Table 5", "Table 6", "Table 7",
                  "Response lengths", "Cost", "All comparisons", "What is missing"):  # fmt: skip
        assert any(found.startswith(title) for found in titles), title
    assert re.search(r"\| staged \| 3 \| [\d.]+ \([\d.]+ to [\d.]+\) \| 51.10 / 42.26 \|", said)
    assert "| order_213 | missing | - | not known |" in said
    assert "| difficulty | 0 | not finished, step 7 |" in said and "| adaptive | all | no run |" in said
    assert "capcur_jax.ablations" not in said  # nothing here remembers what made these runs
    assert f"python -m capcur_jax.report {grid}\n" in said and "- commit: 0000000\n" in said
    assert "not known / 37.70" in said and "-1.60 / -8.10" in said and "+5.20 / +7.40" in said


def test_a_grid_s_own_commands_are_told(tmp_path):
    grid_page.make(tmp_path, {"staged": 0.0, "merged": -0.5}, range(2), questions=30)
    told = "python -m capcur_jax.ablations --rows=staged,merged --seeds=0,1 --preset=laptop_short --workdir=runs/a"
    (tmp_path / "commands.txt").write_text(f"{told}\n")
    page.write([f"staged={tmp_path}/staged/seed0", str(tmp_path)], tmp_path / "page")  # a run of it as well
    said = text_of(tmp_path / "page" / "tables.md")
    assert f"```bash\n{told}\npython -m capcur_jax.report " in said
    assert said.count("capcur_jax.ablations") == 1


def test_the_published_results_follow_from_the_published_answers(tmp_path):
    with tarfile.open(DOCS / "results.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    _, made = page.write([str(tmp_path / "runs" / "ablations")], tmp_path / "page")
    rows = [line for line in text_of(made).splitlines() if line.startswith("|")]
    assert len(rows) > 50 and not {*rows} - {*text_of(DOCS / "results.md").splitlines()}


def test_markdown_and_page_have_the_same_figures(grid):
    shown = text_of(grid / "report.html")
    for line in text_of(grid / "tables.md").splitlines():
        for cell in line.strip("| ").split(" | ") if line.startswith("| staged") else ():
            assert cell.split(" (")[0].replace("<", "&lt;").replace(">", "&gt;") in shown


def test_same_files_same_page(grid, tmp_path):
    first, second = page.write([str(grid)], tmp_path / "grid")
    assert first.read_bytes() == (grid / page.PAGE).read_bytes()
    assert second.read_bytes() == (grid / page.TABLES).read_bytes()


class Inert(html.parser.HTMLParser):
    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "iframe", "object", "embed", "link", "base"), tag
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            assert name not in ("src", "href", "action") or (value or "").startswith(("data:image/", "#")), value


def test_hostile_answers_do_nothing(grid, tmp_path):
    for row in ("staged", "merged"):
        shutil.copytree(grid / row / "seed0", tmp_path / row / "seed0")
        file = folders.predictions_file(tmp_path / row / "seed0/evaluation/final", "text")
        file.write_text(file.read_text().replace("<think>", "</pre><script>alert(1)</script>\u202e<think>"))
    said = text_of(page.write([str(tmp_path)], tmp_path)[0])
    Inert().feed(said)
    assert "&lt;script&gt;alert(1)" in said and "\u202e" not in said and "default-src 'none'" in said


def test_examples_differ_and_come_of_every_outcome(grid):
    shown, of = examples.choose(gather.read([str(grid)]))
    assert 0 < len(shown) <= examples.MOST and of >= len(shown)
    assert {one.values["set"] for one in shown} == {"perception", "text", "visual"}
    for one in shown:
        right = [answer["row"] for answer in one.answers if answer["credit"] == 1]
        assert 0 < len(right) < 3 and one.values["outcome"] == f"right: {' and '.join(right)}"
    assert any(one.pictures and not one.pictures[0].trouble for one in shown)


def test_a_single_run_keeps_its_page(grid, tmp_path, capsys):
    shutil.copytree(grid / "staged/seed0", tmp_path / "run")
    assert main([str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "report.html")
    assert "run report" in text_of(tmp_path / "run" / "report.html")


def test_the_command_says_what_it_needs(grid, tmp_path, capsys):
    assert main([str(grid / "staged/seed0"), str(grid / "merged/seed0")]) == 2
    assert "--output" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2 and "metrics.jsonl" in capsys.readouterr().err
    assert main([str(grid / "staged/seed0"), str(grid / "merged/seed0"), f"--output={tmp_path}"]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "report.html"), str(tmp_path / "tables.md")]


def test_a_grid_that_only_began(tmp_path):
    (tmp_path / "staged" / "seed0").mkdir(parents=True)
    (tmp_path / "staged" / "seed0" / "metrics.jsonl").write_text("")
    found, _ = page.write([str(tmp_path)], tmp_path)
    said = text_of(found)
    assert "not finished, step 0" in said and "no finished run of staged, base" in said


def test_errors_of_perception_are_shown_where_runs_have_them(grid, tmp_path):
    for seed, share in enumerate((0.4, 0.6)):
        shutil.copytree(grid / f"staged/seed{seed}", tmp_path / f"staged/seed{seed}")
        told = {"sets": {"visual": {"text": {"limited_of_wrong": [share, 0.1, 0.9]}}, "text": {}}}
        (tmp_path / f"staged/seed{seed}/evaluation/final/counterfactual.json").write_text(json.dumps(told))
    said = text_of(page.write([str(tmp_path)], tmp_path)[1])
    assert "| staged | visual | told the facts: text | 2 | 50.0 (40.0 to 60.0) |" in said
    assert "## Errors of perception" not in text_of(grid / "tables.md")


def test_a_judge_s_errors_of_perception_are_shown_too(grid, tmp_path):
    """As `evaluate errors` writes them: of the first error, and of any."""
    for seed, (first, anywhere) in enumerate(((2, 3), (1, 3), (0, 0))):
        run = tmp_path / f"staged/seed{seed}"
        shutil.copytree(grid / f"staged/seed{seed}", run)
        wrong = list(folders.read(run).answered["visual"].values())[:4]
        kinds = ["perception"] * first + ["reasoning"] * (4 - first)
        named = [{"first": kind, "present": [kind, *(["perception"] if at < anywhere else [])], "confidence": "high",
                  "saw": "image", "quoted": True} for at, kind in enumerate(kinds)]  # fmt: skip
        found = {"all": errors.summary(wrong, named if seed < 2 else [None] * 4)}  # the third judge decided nothing
        (run / folders.FINAL / errors.FILE).write_text(json.dumps(found))
    table = more.perception_errors(gather.read([str(tmp_path)]))
    cells = {line.cells[2].text: [(cell.text, cell.small) for cell in line.cells[3:]] for line in table.lines}
    assert cells == {
        "judge: first": [("2", ""), ("37.5", "25.0 to 50.0")],
        "judge: anywhere": [("2", ""), ("75.0", "75.0 to 75.0")],
    }
    assert "86.9 %" in table.note


def test_what_was_seen_is_that_of_the_records_and_plans(grid, tmp_path):
    """A row whose selection left fewer problems saw them more often."""
    shutil.copytree(grid / "staged", tmp_path / "staged")
    shutil.copytree(grid / "merged", tmp_path / "difficulty_filtered")
    for seed in range(3):
        file = tmp_path / f"difficulty_filtered/seed{seed}/summary.json"
        summary = json.loads(file.read_text())
        summary["stages"][0]["problems"] = 400
        file.write_text(json.dumps(summary))
    (tmp_path / "staged/seed2/summary.json").write_text('{"status": "finished"}')  # of an earlier version
    lines = {line.row: [cell.text for cell in line.cells[1:]] for line in more.seen(gather.read([str(tmp_path)])).lines}
    assert lines == {"difficulty_filtered": ["960", "400", "2.40"], "staged": ["960", "-", "-"]}


def test_cost_and_kinds_are_means_of_the_seeds(grid):
    said = text_of(grid / "tables.md")
    assert "| staged | 3 | 30 | 3 min 21 s | 0.06 | 57,000 | 33,000 |" in said  # 200, 201 and 202 s; 30 x 1,900 tokens
    head = next(line for line in said.splitlines() if line.startswith("| row | perception: color (30)"))
    found = gather.read([str(grid)])
    right = found.rows["merged"].credit["perception"][:, [kind == "color" for kind in found.kinds["perception"]]]
    line = next(line for line in said.partition(head)[2].splitlines() if line.startswith("| merged |"))
    assert line.startswith(f"| merged | {100 * right.mean():.1f} (")


PROBE = """
const errors = [], done = [];
addEventListener("error", event => errors.push(event.message));
const visible = list => [...list].filter(one => getComputedStyle(one).display !== "none").length;
for (const box of document.querySelectorAll("input[type=checkbox]")) {
  const of = document.querySelectorAll(`[data-row="${box.id.slice(4)}"]`), before = visible(of);
  box.click(); const hidden = visible(of); box.click();
  done.push([box.id, of.length, before, hidden, visible(of)]);
}
const articles = document.querySelectorAll(".same article");
for (const select of document.querySelectorAll("select"))
  for (const option of select.options) {
    select.value = option.value;
    const wanted = option.value ? [...articles].filter(one => one.dataset[select.id] === option.value).length
                                : articles.length;
    done.push([`${select.id} ${option.value}`, articles.length, wanted, visible(articles)]);
    select.value = "";
  }
const out = document.createElement("pre"); out.id = "probe";
out.textContent = JSON.stringify({errors, done, wide: document.documentElement.scrollWidth > innerWidth});
document.body.append(out);
"""


def browsed(file: Path, folder: Path, *more: str) -> subprocess.CompletedProcess:
    command = [CHROMIUM, *BROWSER, f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", *more]
    return subprocess.run([*command, file.as_uri()], capture_output=True, text=True, check=True, timeout=300)


@pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine (apt-get install chromium)")
def test_every_filter_works_in_a_browser_without_console_errors(grid, tmp_path):
    plain = browsed(grid / "report.html", tmp_path, "--dump-dom")
    assert "CONSOLE" not in plain.stderr, plain.stderr
    # The page has no scripts, and its policy forbids them: the copy that is clicked gets one.
    said = text_of(grid / "report.html").replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    (tmp_path / "page.html").write_text(said.replace("</body>", f"<script>{PROBE}</script></body>"))
    clicked = browsed(tmp_path / "page.html", tmp_path, "--dump-dom", "--window-size=1280,900")
    assert "CONSOLE" not in clicked.stderr, clicked.stderr
    result = re.search(r'<pre id="probe">(.*?)</pre>', clicked.stdout, re.DOTALL)
    found = json.loads(html.unescape(result[1]))
    assert not found["errors"] and not found["wide"], found
    boxes = [one for one in found["done"] if one[0].startswith("row-")]
    chosen = [one for one in found["done"] if not one[0].startswith("row-")]
    assert len(boxes) > 15 and len(chosen) > 10
    assert all(of > 0 and (before, hidden, after) == (of, 0, of) for _, of, before, hidden, after in boxes), boxes
    assert all(0 < wanted == visible for _, _, wanted, visible in chosen), chosen


@pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine (apt-get install chromium)")
def test_it_prints(grid, tmp_path):
    browsed(grid / "report.html", tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'page.pdf'}")
    pages = len(re.findall(rb"/Type\s*/Page\b(?!s)", (tmp_path / "page.pdf").read_bytes()))
    assert 3 <= pages <= 60


def test_the_command_line_prints_paths_alone(grid, tmp_path):
    command = [sys.executable, "-m", "capcur_jax.report", str(grid), f"--output={tmp_path}"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == [str(tmp_path / "report.html"), str(tmp_path / "tables.md")]
