"""Relative paths in settings files, read from more than one working directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bst_base.places import Address, LocalPath
from bst_base.settings import Config, dump, load
from bst_dist.config import Recipe, differing, digest, load_recipe
from bst_dist.train.rundir import RECIPE, read_recipe


class Part(Config):
    where: Address


class Places(Config):
    folder: LocalPath | None = None
    source: Address | tuple[Part, ...] = "nowhere"
    word: str = ""


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory other than that of the files."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def written(place: Path, **data) -> Path:
    place.mkdir(exist_ok=True)
    (place / "file.yaml").write_text(json.dumps(data))
    return place / "file.yaml"


def test_relative_paths_start_from_the_folder_of_their_file(tmp_path, elsewhere):
    own = tmp_path / "own"
    found = load(Places, written(own, folder="a/b", source=[{"where": "c"}, {"where": "s3://d/e"}], word="f"))
    assert (found.folder, found.source[0].where, found.source[1].where) == (own / "a/b", str(own / "c"), "s3://d/e")
    assert found.word == "f"
    assert "folder: a/b\n" in dump(found) and "where: c\n" in dump(found)


@pytest.mark.parametrize("address", ["https://a/b", "pipe:cat x/{}", "/data/x"])
def test_urls_and_absolute_paths_are_not_changed(address, tmp_path, elsewhere):
    assert load(Places, written(tmp_path / "own", source=address)).source == address


@pytest.mark.parametrize("override", [False, True])
def test_a_tilde_is_the_home_directory_and_is_written_as_a_tilde(override, tmp_path, elsewhere, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    given = {"folder": "~/a", "source": [{"where": "~/c"}], "word": "~/d"}
    file = written(tmp_path / "own", **({} if override else given))
    found = load(Places, file, ["folder=~/a", "source=[{where: ~/c}]", "word=~/d"] if override else [])
    assert found.folder == tmp_path / "home/a"
    assert found.source[0].where == f"{tmp_path}/home/c"
    assert found.word == "~/d"
    assert "folder: ~/a\n" in dump(found) and "where: ~/c\n" in dump(found)


def test_paths_in_overrides_start_from_the_working_directory(tmp_path, elsewhere):
    file = written(tmp_path / "own", folder="a")
    assert load(Places, file, ["folder=b", "source=c"]).folder == elsewhere / "b"


@pytest.fixture
def recipe(tmp_path: Path, settings) -> Path:
    """A recipe whose corpus is next to its folder."""
    settings["data"]["corpus"] = "../corpora/texts"
    return written(tmp_path / "own", **settings)


def test_recipe_does_not_depend_on_the_working_directory(recipe, tmp_path, monkeypatch):
    found = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        found.append(load_recipe(Path("..") / "own" / recipe.name))
    assert digest(found[0]) == digest(found[1]) and not differing(*found)
    assert {Path(one.data.corpus).resolve() for one in found} == {tmp_path / "corpora" / "texts"}


def test_stored_recipe_keeps_the_meaning_of_its_paths(recipe, tmp_path, elsewhere):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / RECIPE).write_text(dump(load_recipe(recipe)))
    assert Path(read_recipe(tmp_path / "run").data.corpus).resolve() == tmp_path / "corpora" / "texts"
    copy = Recipe.model_validate(load_recipe(recipe).model_dump(mode="json"))
    assert copy.data.corpus == load_recipe(recipe).data.corpus


def test_an_override_of_another_place_is_stored_as_an_absolute_path(recipe, tmp_path, elsewhere):
    changed = load_recipe(recipe, ["data.corpus=mine"])
    assert changed.model_dump(mode="json")["data"]["corpus"] == str(elsewhere / "mine")


def test_stored_recipe_without_paths_from_uses_the_working_directory(recipe, tmp_path, elsewhere):
    (tmp_path / "run").mkdir()
    lines = dump(load_recipe(recipe)).splitlines(keepends=True)
    (tmp_path / "run" / RECIPE).write_text("".join(line for line in lines if not line.startswith("paths_from")))
    assert read_recipe(tmp_path / "run").data.corpus == str(elsewhere / "../corpora/texts")


def test_recipe_can_set_paths_from(recipe, tmp_path, elsewhere, settings):
    recipe = written(tmp_path / "own", **settings, paths_from="..")
    assert Path(load_recipe(recipe).data.corpus).resolve() == tmp_path.parent / "corpora" / "texts"
