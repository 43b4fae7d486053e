from __future__ import annotations

import json

from bst_dist.cli import main


def test_every_layer_of_ours_is_timed_and_shown(tmp_path, capsys):
    report = tmp_path / "layers.json"
    assert (
        main(
            [
                "bench",
                "layers",
                "--shape",
                "latency",
                "--lengths",
                "64",
                "--dtypes",
                "fp32",
                "--rounds",
                "1",
                "--no-peers",
                "--only",
                "sliding",
                "BST SH",
                "GSS",
                "--json",
                str(report),
            ]
        )
        == 0
    )
    rows = json.loads(report.read_text())["layers"]
    assert [row["layer"] for row in rows] == ["sliding", "BST SH", "GSS"]
    assert all(row["training_s"]["median"] > 0 and row["fraction_of_peak"]["median"] > 0 for row in rows)
    said = capsys.readouterr().out
    assert "64 tokens, fp32" in said and "BST SH" in said
