from __future__ import annotations

import pytest

from bst_base import shipped
from bst_base.shipped import CORPORA, RECIPES, STRATEGIES, SWEEPS, NoSuchFileError, base_of, find, names, root


@pytest.mark.parametrize(
    ("given", "folder", "found"),
    [
        ("demo", RECIPES, "launch/recipes/demo.yaml"),
        ("demo.yaml", RECIPES, "launch/recipes/demo.yaml"),
        ("paper/small-full", RECIPES, "launch/recipes/paper/small-full.yaml"),
        ("launch/recipes/lra/text.yaml", RECIPES, "launch/recipes/lra/text.yaml"),
        ("zero2", STRATEGIES, "ds_configs/zero2.json"),
        ("ds_configs/zero2.json", STRATEGIES, "ds_configs/zero2.json"),
        ("stdlib", CORPORA, "launch/data/stdlib.yaml"),
        ("smoke", SWEEPS, "launch/sweeps/smoke.yaml"),
    ],
)
def test_shipped_files_are_found_by_name_and_by_their_path_from_anywhere(given, folder, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find(given, folder) == root() / found


def test_local_file_has_priority_over_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # a folder of that name is no recipe
    assert find("demo", RECIPES).is_relative_to(root())
    (tmp_path / "zero2.json").write_text("{}")
    assert find("zero2.json", STRATEGIES).resolve() == tmp_path / "zero2.json"


def test_missing_file_error_names_searched_paths_and_nearest_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NoSuchFileError, match=f"^dmeo.yaml: no .* mean 'demo'.* looked at {tmp_path}/dmeo.yaml"):
        find("dmeo.yaml", RECIPES)
    with pytest.raises(NoSuchFileError, match="there are zero0, zero1, "):
        find("fsdp", STRATEGIES)


def test_every_shipped_file_has_a_name():
    assert {"zero0", "zero3_cpu_offload"} <= set(names(STRATEGIES))
    assert {"demo", "bst-7b", "ablations/ssm"} <= set(names(RECIPES))


def test_base_folder_of_paths_is_found_for_own_and_shipped_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert base_of(tmp_path / "own" / "recipes" / "own.yaml") == tmp_path / "own" / "recipes"
    assert base_of(tmp_path / "own/launch/recipes/paper/own.yaml") == tmp_path / "own"
    assert base_of(root() / "launch/recipes/demo.yaml") == root()
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "bst_base/shipped.py"))  # as in an installed program
    assert base_of(tmp_path / "bst_base/shipped/launch/recipes/demo.yaml") == tmp_path
