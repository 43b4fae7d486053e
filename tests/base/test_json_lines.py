from __future__ import annotations

from bst_base.clock import utc_now
from bst_base.json_lines import dropped_file, keep_dropped, read_lines


def test_an_incomplete_last_line_and_a_missing_file_are_not_read(tmp_path):
    path = tmp_path / "found.jsonl"
    assert read_lines(path) == []
    path.write_text('{"step": 1}\n\n{"step": 2}\n{"step": 3')
    assert read_lines(path) == [{"step": 1}, {"step": 2}]


def test_dropped_lines_are_appended_with_the_time(tmp_path):
    path, before = tmp_path / "found.jsonl", utc_now()
    keep_dropped(path, [])
    assert not dropped_file(path).exists()
    keep_dropped(path, [{"step": 2}])
    keep_dropped(path, [{"step": 2}, {"step": 3}])
    kept = read_lines(tmp_path / "found.dropped.jsonl")
    assert [line["step"] for line in kept] == [2, 2, 3]
    assert before <= kept[0]["dropped"] <= kept[1]["dropped"] == kept[2]["dropped"] <= utc_now()
