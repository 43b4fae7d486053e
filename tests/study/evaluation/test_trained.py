from __future__ import annotations

import json

import pytest
import torch

from bst_base.errors import UserError
from bst_dist.checkpoint.directory import MANIFEST, OPTIMIZER, WEIGHTS, directory, shard_file
from bst_dist.model.lm import LanguageModel
from bst_dist.study.evaluation.trained import open_run, open_validation


def test_the_newest_checkpoint_is_opened_and_an_older_one_on_request(make_run):
    run_dir = make_run(steps=(2, 4))
    assert [open_run(run_dir).step, open_run(run_dir, 2).step] == [4, 2]
    assert not torch.equal(open_run(run_dir).model.embedding.weight, open_run(run_dir, 2).model.embedding.weight)


def test_step_zero_is_the_initial_model_of_the_seed(make_run):
    trained = open_run(make_run(), 0)
    torch.manual_seed(trained.recipe.seed)
    expected = LanguageModel(trained.recipe.model)
    for name, parameter in trained.model.state_dict().items():
        assert torch.equal(parameter, expected.state_dict()[name]), name


def test_damaged_newest_checkpoint_is_skipped(make_run):
    run_dir = make_run(steps=(2, 4))
    path = directory(run_dir, 4) / shard_file(WEIGHTS, 0)
    path.write_bytes(path.read_bytes()[:-1])
    assert open_run(run_dir).step == 2
    with pytest.raises(UserError, match="bytes instead of"):
        open_run(run_dir, 4)


def test_missing_checkpoint_error_lists_the_existing_ones(make_run):
    with pytest.raises(UserError, match="no checkpoint of step 3; there are: 4, 2"):
        open_run(make_run(steps=(2, 4)), 3)


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no run there"):
        open_run(tmp_path)


def test_only_the_weights_of_a_checkpoint_are_read(make_run):
    run_dir = make_run()
    path = directory(run_dir, 4) / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"][shard_file(OPTIMIZER, 0)] = {"bytes": 9, "sha256": "0" * 64, "rank": 0}  # a missing file
    path.write_text(json.dumps(manifest))
    assert [open_run(run_dir).step, open_run(run_dir, 4).step] == [4, 4]


def test_the_precision_can_be_chosen(make_run):
    run_dir = make_run()
    assert [open_run(run_dir, precision=each).recipe.train.precision for each in (None, "bf16")] == ["fp32", "bf16"]


def test_validation_text_that_has_changed_since_training_is_refused(make_run):
    trained = open_run(make_run())
    (corpus,) = open_validation(trained)  # of an older run: on which text it was trained is unknown
    environment = trained.run_dir / "environment.json"
    for sha256 in (corpus.sha256, "0" * 64):
        starts = [{"versions": {}, "corpora": [{"path": str(corpus.where), "sha256": sha256}]}]
        environment.write_text(json.dumps({"starts": starts}))
        if sha256 == corpus.sha256:
            assert len(open_validation(trained)) == 1
    with pytest.raises(UserError, match="its corpus has changed since it was trained"):
        open_validation(trained)
