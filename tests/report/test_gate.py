"""`hft gate`: limits on what was lost and gained, with their intervals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_runs import write_eval, write_items, write_run

from hft_cli.cli.commands import run_command
from hft_cli.errors import UserError
from hft_cli.report.gate import Check, checks, gate_text, ships
from hft_cli.report.reading import find_runs


def items(lost: int, n: int = 200) -> tuple[list[float], list[float]]:
    return [1.0] * n, [0.0] * lost + [1.0] * (n - lost)


@pytest.fixture
def run(tmp_path) -> Path:
    folder = write_run(tmp_path / "run", skill=0.9)
    write_items(folder, "pocket/facts", *items(20))
    write_items(folder, "data/capitals", [0.0] * 200, [1.0] * 180 + [0.0] * 20)
    return folder


def gate(run: Path, *words: str) -> int:
    return run_command("gate", [str(run), *words])


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("--max-loss", "16", "--min-gain", "80"), 0, "ship"),
        (("--max-loss", "5"), 3, "do not ship: pocket/facts fails"),
        (("--max-loss", "10"), 3, "pocket/facts cannot tell"),  # 10 points were lost, between 6 and 15
        (("--min-gain", "95"), 3, "data/capitals fails"),
        (("max-loss=16", "--suite", "pocket"), 0, "ship"),
    ],
)
def test_a_limit_holds_with_its_whole_interval(run, words, status, said, capsys):
    assert gate(run, *words) == status
    assert said in capsys.readouterr().out


def test_a_change_at_the_limit_passes():
    """0.50 to 0.48 are 2 points and a rounding error."""
    change = 100 * (0.48 - 0.50)
    assert Check("t", change, change, change, -2.0, 50).result == "passes"
    assert Check("t", change, change - 0.01, change, -2.0, 50).result == "cannot tell"


def test_more_items_tell_what_few_cannot(tmp_path):
    for n in (200, 5000):
        write_items(write_run(tmp_path / str(n), seed=n), "pocket/facts", *items(n // 50, n))
    few, many = (checks(run, 3.0, None)[0] for run in sorted(find_runs([tmp_path]), key=lambda run: run.row.seed))
    assert (few.change, many.change) == pytest.approx((-2, -2))
    assert (few.result, many.result) == ("cannot tell", "passes")


def test_bits_per_byte_lose_when_they_rise_in_percent_of_before(tmp_path):
    run = write_run(tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    for when, value in (("before", 0.8), ("after", 0.84)):
        results["eval"][when]["text"] = {"book": {"bits_per_byte": value}}
    (run / "results.json").write_text(json.dumps(results))
    for when, value in (("before", 0.8), ("after", 0.84)):
        file = run / "eval" / when / "text" / "book.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("".join(json.dumps({"row": n, "bits_per_byte": value}) + "\n" for n in range(20)))
    (found,) = [check for check in checks(find_runs([run])[0], 4.0, None) if check.task == "text/book"]
    assert (found.change, found.low, found.high) == pytest.approx((-5, -5, -5))
    assert (found.items, found.result) == (20, "fails")


def test_a_suite_without_a_score_before_does_not_pass(run, capsys):
    write_eval(run, "text", {}, {"book": [1.0] * 300})
    assert gate(run, "--max-loss", "20") == 3
    assert gate(run, "--max-loss", "20", "--suite", "text") == 3
    said = capsys.readouterr().out
    fix = f"text/book: no score before: hft eval run={run} suite=text 'models=[before,after]'."
    assert said.count(fix) == 2
    assert "more items tell" not in said


def test_scores_of_other_limits_do_not_pass(run, capsys):
    write_eval(run, "probe", {"facts": [1.0] * 30}, {"facts": [1.0] * 200})
    assert gate(run, "--max-loss", "20", "--suite", "probe") == 3
    assert "probe/facts: not comparable, because before and after differ in items (30, 200)" in capsys.readouterr().out


def test_one_item_between_0_and_1_opens_no_gate(run, capsys):
    write_items(run, "pocket/facts", [0.5], [0.5])
    assert gate(run, "--max-loss", "20") == 3
    assert "pocket/facts: no interval, because that needs 10 items and there are 1." in capsys.readouterr().out


def test_a_half_reset_is_compared_with_its_base(tmp_path, capsys):
    """As the report does: what its tuned model had lost before is lost."""
    run = write_run(tmp_path / "run", "half_reset")
    write_items(run, "pocket/facts", before=[0.0] * 200, after=[0.0] * 100 + [1.0] * 100, base=[1.0] * 200)
    assert gate(run, "--max-loss", "5") == 3
    assert "pocket/facts fails" in capsys.readouterr().out
    write_eval(run, "text", {"book": [1.0] * 300}, {"book": [1.0] * 300})
    assert gate(run, "--max-loss", "5", "--suite", "text") == 3
    assert f"no score of the base: hft eval run={run} suite=text 'models=[base,after]'" in capsys.readouterr().out


@pytest.mark.parametrize("broken", [None, "{", '{"row": 0}\n'])
def test_a_score_without_items_does_not_open_the_gate(run, broken, capsys):
    assert gate(run, "--max-loss", "20") == 0
    items = run / "eval/after/pocket/facts.jsonl"
    items.unlink() if broken is None else items.write_text(broken)
    assert gate(run, "--max-loss", "100") == 3
    said = capsys.readouterr().out
    assert "do not ship: pocket/facts cannot tell" in said
    assert "pocket/facts: no scores of single items" in said


def test_suites_of_later_evaluations_are_checked_by_name(run):
    write_eval(run, "knowledge", {"nq": [1.0] * 300}, {"nq": [1.0] * 299 + [0.0]})
    found = checks(find_runs([run])[0], 5.0, None, ["knowledge"])
    assert [check.task for check in found] == ["knowledge/nq"]
    assert ships(found)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "Give a limit: --max-loss 2, --min-gain 5, or both"),
        (("--max-loss", "two"), "two is no number of points"),
        (("--max-loss", "-1"), "-1"),
        (("--max-loss", "2", "--suite", "knowlege"), "Unknown suite 'knowlege'. Available: pocket"),
    ],
)
def test_a_mistake_is_said_in_a_line(run, words, said):
    with pytest.raises(UserError) as error:
        gate(run, *words)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_without_scores_has_nothing_to_check(tmp_path):
    run = write_run(tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    results["eval"] = {"before": {}, "after": {}}
    (run / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match=r"nothing to check in .* --max-loss needs scores of a suite"):
        gate(run, "--max-loss", "1")


@pytest.mark.parametrize("name", ["results.json", "eval/knowledge.json"])
@pytest.mark.parametrize("text", ["{", '{"eval": {"before": NaN}}'])
def test_the_gate_names_a_file_that_is_broken(run, name, text):
    (run / name).write_text(text)
    with pytest.raises(UserError, match=rf"cannot be read: .*{name.partition('/')[2]}") as error:
        gate(run, "--max-loss", "100")
    assert "\n" not in str(error.value)
    if name != "results.json":
        assert gate(run, "--max-loss", "100", "--suite", "pocket") == 0


def test_the_table_has_a_row_for_each_check(run):
    text = gate_text(checks(find_runs([run])[0], 16.0, 80.0))
    assert [line.split()[0] for line in text.splitlines()[1:3]] == ["pocket/facts", "data/capitals"]


def with_noise(run: Path, suite: str, **noise: float) -> None:
    file = run / "eval" / f"{suite}.json"
    results = json.loads(file.read_text())
    results["models"]["after"]["again"] = {name: {"noise": value} for name, value in noise.items()}
    file.write_text(json.dumps(results))


def test_the_noise_of_scoring_widens_the_interval(run):
    write_eval(run, "knowledge", {"nq": [1.0] * 300}, {"nq": [1.0] * 299 + [0.0]})
    (quiet,) = checks(find_runs([run])[0], 3.0, None, ["knowledge"])
    with_noise(run, "knowledge", nq=0.06)
    (noisy,) = checks(find_runs([run])[0], 3.0, None, ["knowledge"])
    assert (quiet.result, noisy.result) == ("passes", "cannot tell")
    assert (quiet.noise, noisy.noise) == (None, pytest.approx(6))
    assert noisy.change == quiet.change
    assert (noisy.change - noisy.low) ** 2 == pytest.approx((quiet.change - quiet.low) ** 2 + 36)
    assert (noisy.high - noisy.change) ** 2 == pytest.approx((quiet.high - quiet.change) ** 2 + 36)
    assert "±6.0" in gate_text([noisy])
    with_noise(run, "knowledge", another=0.06)
    assert checks(find_runs([run])[0], 3.0, None, ["knowledge"]) == [quiet]
