"""Settings: what a user gets wrong is told with its place and the nearest key."""

from typing import Annotated, Literal

import pytest
from pydantic import Discriminator, Tag

from bst_base.settings import Config, ConfigError, dump, fields, load, overridden, parse


class Inner(Config):
    rate: float = 0.1
    """How fast."""


class Circle(Config):
    kind: Literal["circle"] = "circle"
    radius: float = 1
    """Half the width."""


class Square(Config):
    kind: Literal["square"]
    side: float = 1
    """The width."""


def kind_of(section) -> str:
    return section.get("kind", "circle") if isinstance(section, dict) else section.kind


Shape = Annotated[Annotated[Circle, Tag("circle")] | Annotated[Square, Tag("square")], Discriminator(kind_of)]


class Outer(Config):
    name: str
    """What it is called."""
    steps: int = 5
    inner: Inner = Inner()
    shape: Shape = Circle()


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("name: a\ninner:\n  rate: 1e-3\n")
    return file


def test_overrides_are_yaml_and_win(path):
    read = load(Outer, path, ["steps=7", "inner.rate=2e-4"])
    assert (read.name, read.steps, read.inner.rate) == ("a", 7, 2e-4)


def test_an_override_makes_the_section_that_it_is_in():
    for before in ({}, {"inner": None}, {"inner": {"rate": 1}}):
        assert overridden(before, ["inner.rate=2"]) == {"inner": {"rate": 2}}


def test_what_is_written_reads_back_equal(path, tmp_path):
    read = load(Outer, path)
    (tmp_path / "copy.yaml").write_text(dump(read))
    assert load(Outer, tmp_path / "copy.yaml") == read


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stesp=7", "unknown key 'stesp': did you mean 'steps'?"),
        ("inner.rat=7", "unknown key 'inner.rat': did you mean 'inner.rate'?"),
        ("rate=7", "unknown key 'rate': did you mean 'inner.rate'?"),
        ("inner.zzz=7", "unknown key 'inner.zzz'; known there: rate"),
        ("shape.radus=7", "unknown key 'shape.radus': did you mean 'shape.radius'?"),
        ("shape={kind: square, radius: 2}", "unknown key 'shape.radius'"),
        ("steps=many", "steps: input should be a valid integer.*'many'"),
        ("steps", "expected section.field=value"),
        ("name.x=1", "'name' is a value, not a section"),
        ("steps=[", "not YAML"),
    ],
)
def test_errors_name_the_key(path, override, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?").replace(".*", "X").replace("X", ".*")):
        load(Outer, path, [override])


def test_every_problem_is_listed(path):
    with pytest.raises(ConfigError) as caught:
        parse(Outer, {"steps": "x", "nam": "a"}, where="here")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("here: ") for line in lines)


@pytest.mark.parametrize(("text", "message"), [("- 1\n", "expected settings"), ("a: [", "not readable as YAML")])
def test_a_file_that_is_no_settings_is_refused(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(Outer, tmp_path / "x.yaml")
    with pytest.raises(ConfigError, match="no such file"):
        load(Outer, tmp_path / "y.yaml")


def test_fields_are_documented_where_they_are_declared():
    listed = {name: (kind, default, text) for name, kind, default, text in fields(Outer)}
    assert listed["inner.rate"] == ("float", 0.1, "How fast.")
    assert listed["shape.radius"] == ("float", 1, "(circle) Half the width.")
    assert listed["shape.side"] == ("float", 1, "(square) The width.")
    assert listed["name"] == ("str", "required", "What it is called.")
