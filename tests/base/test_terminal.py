from __future__ import annotations

import pytest

from bst_base.terminal import Sheet, is_numeric, print_table, say


@pytest.mark.parametrize(
    ("cells", "numbers"),
    [
        (["1,024", "+0.5 ± 0.1", "−3", "(12)"], True),
        (["0.1", "–", ""], True),
        (["0.1", "ours"], False),
        (["–", "-", ""], False),
        ([], False),
    ],
)
def test_a_column_is_of_numbers_when_all_that_is_known_are(cells, numbers):
    assert is_numeric(cells) is numbers


def test_in_a_pipe_no_cell_is_cut_and_markup_is_text(capsys):
    long = "x" * 150
    print_table(Sheet(("[bold]", "nats"), [[long, "0.25"], ["[/]", "12.5"]]), "of [red]runs", "± over [seeds]")
    title, _, head, _, first, second, *_, caption = capsys.readouterr().out.splitlines()
    assert (title, caption) == ("of [red]runs", "± over [seeds]")
    assert head.split() == ["[bold]", "nats"]
    assert first.split() == [long, "0.25"] and second.split() == ["[/]", "12.5"]
    assert first.index("0.25") + 4 == second.index("12.5") + 4 == head.index("nats") + 4  # flush right


def test_rows_are_set_apart_where_asked_for(capsys):
    print_table(Sheet(("arm", "loss"), [["one", "1"], ["two", "2"], ["two − one", "1"]], rule_after=2))
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert [line[:3] for line in lines] == ["", "arm", "───", "one", "two", "", "two", ""]


def test_a_line_is_printed_as_it_is_and_never_wrapped(capsys):
    text = "[yes] :smile: " + "word " * 60
    say(text)
    assert capsys.readouterr().out == f"{text}\n"
