"""The free disk space that a start of a run requires."""

from __future__ import annotations

from bst_dist.checkpoint.directory import CHECKPOINTS
from bst_dist.cluster.space import Space, space_for_checkpoints
from tests.cluster.listed_checkpoint import write_checkpoint


def test_a_new_run_needs_space_for_two_checkpoints(tmp_path):
    assert space_for_checkpoints(tmp_path / "none", 1000) == Space(2, 32_000)


def test_a_run_with_a_full_checkpoint_needs_space_for_one_of_its_size(tmp_path):
    write_checkpoint(tmp_path, 10, {"weights-00000.safetensors": 1000, "optimizer-00000.safetensors": 2000})
    write_checkpoint(tmp_path, 20, {"weights-00000.safetensors": 4000, "optimizer-00000.safetensors": 8000})
    write_checkpoint(tmp_path, 30, {"weights-00000.safetensors": 4000})  # weights-only
    assert space_for_checkpoints(tmp_path, 1000) == Space(1, 12_000)


def test_a_run_with_weights_only_checkpoints_needs_space_for_two(tmp_path):
    write_checkpoint(tmp_path, 30, {"weights-00000.safetensors": 4000})
    assert space_for_checkpoints(tmp_path, 1000) == Space(2, 32_000)


def test_the_space_of_a_run_that_cannot_be_read_is_estimated(tmp_path):
    (tmp_path / CHECKPOINTS).touch()  # listing a file is an error, also for root
    assert space_for_checkpoints(tmp_path, 1000) == Space(1, 16_000)
