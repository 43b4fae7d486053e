from __future__ import annotations

import sys

import pytest

from bst_base.terminal import Sheet, is_numeric, print_table, say


@pytest.mark.parametrize(
    ("cells", "numbers"),
    [
        (["1,024", "+0.5 ± 0.1", "−3", "(12)"], True),
        (["0.1", "–", ""], True),
        (["> 16.7", "49.8 (+3.1)", "…"], True),
        (["0.1", "ours"], False),
        (["–", "-", ""], False),
        ([], False),
    ],
)
def test_column_is_numeric_if_all_known_cells_are_numbers(cells, numbers):
    assert is_numeric(cells) is numbers


def test_piped_table_has_full_cells_and_literal_markup(capsys):
    long = "x" * 150
    print_table(Sheet(("[bold]", "nats"), [[long, "0.25"], ["[/]", "12.5"]]), "of [red]runs", "± over [seeds]")
    title, _, head, _, first, second, *_, caption = capsys.readouterr().out.splitlines()
    assert (title, caption) == ("of [red]runs", "± over [seeds]")
    assert head.split() == ["[bold]", "nats"]
    assert first.split() == [long, "0.25"] and second.split() == ["[/]", "12.5"]
    assert first.index("0.25") + 4 == second.index("12.5") + 4 == head.index("nats") + 4  # flush right


def test_narrow_terminal_wraps_words_but_not_numbers(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    rows = [["first-name-of-all", "0.2500 ± 0.0001", "x" * 12], ["b", "1,234,567", "one two three"]]
    print_table(Sheet(("", "nats", "words"), rows))
    shown = capsys.readouterr().out
    assert all(cell in shown for cell in ("first-name-of-all", "0.2500 ± 0.0001", "1,234,567", "x" * 12))
    assert "one two three" not in shown  # wrapped


def test_words_among_numbers_can_be_right_aligned(capsys):
    print_table(Sheet(("", "one", "two"), [["state", "finished", "0.5"], ["steps", "60", "1"]], flush_right=True))
    first, second = (line.rstrip() for line in capsys.readouterr().out.splitlines()[3:5])
    assert first.index("finished") + len("finished") == second.index("60") + 2


def test_rows_can_be_separated_by_an_empty_line(capsys):
    print_table(Sheet(("arm", "loss"), [["one", "1"], ["two", "2"], ["two − one", "1"]], rule_after=2))
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert [line[:3] for line in lines] == ["", "arm", "───", "one", "two", "", "two", ""]


def test_lines_are_printed_unchanged_and_not_wrapped(capsys):
    text = "[yes] :smile: " + "word " * 60
    say(text)
    assert capsys.readouterr().out == f"{text}\n"
