"""Cells, CSV and the estimates in a record."""

from __future__ import annotations

from hft_cli.report.stats import Estimate
from hft_cli.report.tables import Table, columns, csv_text, estimate_cell, estimate_fields, formatted, p_value, percent


def test_an_estimate_reads_as_mean_deviation_and_interval():
    record = estimate_fields("x", Estimate(0.6, 5, 0.1, 0.352, 0.848, 0.5, 0.7))
    assert record == {
        "x": 0.6, "x_n": 5, "x_sd": 0.1, "x_low": 0.352, "x_high": 0.848, "x_least": 0.5, "x_most": 0.7
    }  # fmt: skip
    assert estimate_cell("x")(record) == "60.0 ± 10.0 [35.2, 84.8]"
    assert estimate_cell("x", signed=True, deviation=False)(record) == "+60.0 [+35.2, +84.8]"
    assert estimate_cell("x")(record | {"x_n": 4}) == "60.0 (50.0 to 70.0) [35.2, 84.8]"
    assert estimate_cell("x", scale=1)(estimate_fields("x", Estimate(2.0, 1))) == "2.0"


def test_a_missing_estimate_is_an_empty_cell():
    record = estimate_fields("x", None)
    assert list(record) == ["x", "x_n", "x_sd", "x_low", "x_high", "x_least", "x_most"]
    assert estimate_cell("x")(record) == percent("x")(record) == formatted("x")({}) == ""


def test_small_p_values_are_bounded():
    assert [p_value("p")({"p": p}) for p in (0.04, 0.0002, None)] == ["0.040", "< 0.001", ""]


def test_csv_has_every_key_and_raw_values():
    assert csv_text([{"a": 1, "b": None}, {"a": 0.1, "c": "x,y"}]) == 'a,b,c\n1,,\n0.1,,"x,y"\n'


def test_the_head_of_a_long_table_says_what_is_left_out():
    table = Table("t", "Numbers.", columns("n"), [{"n": i} for i in range(9)])
    assert table.head(9) is table
    assert table.head(2).body == [["0"], ["1"]]
    assert table.head(2).caption == "Numbers. Shown are the first 2 of 9 rows; t.csv has all of them."


def test_a_latex_table_has_its_characters_escaped():
    table = Table("t", "Numbers.", columns("share_of"), [{"share_of": "5% of $x_1$ & more ± 2"}])
    assert r"5\% of \$x\_1\$ \& more ± 2" in table.latex()
    assert r"\toprule" in table.latex()
