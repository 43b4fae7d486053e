"""`bst train`, as a user starts it."""

from __future__ import annotations

import hashlib
import json

import pytest

from bst_dist.checkpoint.directory import load_weights, newest_valid
from bst_dist.cli import main
from bst_dist.train.rundir import read_outcome


@pytest.mark.ranks
def test_bst_train_trains_resumes_by_its_directory_and_reports(recipe_file, corpus, tmp_path, capfd):
    recipe, run_dir, report = str(recipe_file()), tmp_path / "run", tmp_path / "report.json"
    assert main(["train", recipe, "--run-dir", str(run_dir), "--ranks", "2", "--until", "3"]) == 0
    assert read_outcome(run_dir)["finished"] is False
    assert (run_dir / "tokenizer.model").read_bytes() == (corpus / "tokenizer.model").read_bytes()
    (start,) = json.loads((run_dir / "environment.json").read_text())["starts"]
    digest = hashlib.sha256((corpus / "manifest.json").read_bytes()).hexdigest()
    assert start["corpora"] == [{"path": str(corpus.resolve()), "sha256": digest}]
    assert main(["train", str(run_dir), "--ranks", "2", "--resume", "--json", str(report)]) == 0
    outcome = read_outcome(run_dir)
    assert outcome["finished"] is True
    assert outcome["step"] == 6
    assert '"validation_bits_per_byte"' in report.read_text()
    assert load_weights(newest_valid(run_dir))
    said = capfd.readouterr()
    assert "tokens/s" in said.out
    assert "WARNING" not in said.out + said.err
