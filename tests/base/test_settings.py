"""Settings: error messages contain the place of the mistake and the nearest key."""

from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Discriminator, Tag

from bst_base.errors import StorageError
from bst_base.settings import Config, ConfigError, dump, fields, load, overridden, parse
from bst_base.yaml_text import SettingsError, read_yaml, write_yaml


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
    extra: Inner | None = None
    many: tuple[Square, ...] = ()


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("name: a\ninner:\n  rate: 1e-3\n")
    return file


def test_overrides_are_yaml_and_replace_settings(path):
    read = load(Outer, path, ["steps=7", "inner.rate=2e-4"])
    assert (read.name, read.steps, read.inner.rate) == ("a", 7, 2e-4)


def test_override_creates_its_missing_section():
    for before in ({}, {"inner": None}, {"inner": {"rate": 1}}):
        assert overridden(before, ["inner.rate=2"]) == {"inner": {"rate": 2}}


def test_written_settings_read_back_equal(path, tmp_path):
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
        ("name=*.py", """not YAML: .*; text like this needs quotes of its own: 'name=".X.py"'"""),
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
def test_file_without_settings_is_refused(tmp_path, text, message):
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
    assert listed["extra"] == ("section | None", None, "")
    assert listed["extra.rate"] == ("float", 0.1, "How fast.")
    assert listed["many"] == ("tuple[section, ...]", (), "")
    assert listed["many[].side"] == ("float", 1, "The width.")


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("name: a\nsteps: 1\nname: b\n", "line 3: the key 'name' is given twice (lines 1 and 3)"),
        ("name: a\ninner:\n  rate: 1\n  rate: 2\n", "line 4: the key 'rate' is given twice (lines 3 and 4)"),
        ("name: a\ninner: {rate: 1, rate: 2}\n", "line 2: the key 'rate' is given twice (line 2, twice)"),
        ("name: a\nshape:\n  - {kind: x, kind: y}\n", "line 3: the key 'kind' is given twice (line 3, twice)"),
    ],
)
def test_a_key_given_twice_is_refused_with_both_lines(tmp_path, text, lines):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(Outer, tmp_path / "x.yaml")
    assert lines in str(caught.value)


def test_a_file_that_the_system_cannot_read_is_no_error_of_the_settings():
    """A restart may succeed. Reading the first page of a process's memory is an input/output error, also for root."""
    with pytest.raises(StorageError, match=r"cannot read /proc/self/mem: Input/output error"):
        load(Outer, "/proc/self/mem")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("1e3", 1000.0),
        ("1e-3", 0.001),
        ("-2.5E+2", -250.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("1_000", 1000),
        ("12", 12),
        ("0", 0),
        ("-0", 0),
        ("0.5", 0.5),
        ("0x1F", 31),
        ("0o17", 15),
        ("+3", 3),
        (".inf", float("inf")),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("12:30:45", "12:30:45"),
        ("2024-01-02", "2024-01-02"),
        ("1e3x", "1e3x"),
        ("1k", "1k"),
        ("'no'", "no"),
        ('"012"', "012"),
        ("nope", "nope"),
        ("[1e2, a]", [100.0, "a"]),
        ("0x_", "0x_"),
        ("0.0.1", "0.0.1"),
        ("1_000.5", 1000.5),
        ("only", "only"),
        ("yesterday", "yesterday"),
        ("e5", "e5"),
    ],
)
def test_plain_yaml_values_are_read_as_expected(written, meant):
    found = read_yaml(written)
    assert found == meant and type(found) is type(meant)
    assert read_yaml(write_yaml({"x": meant}))["x"] == meant


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("no", "no could be false or text: write false, or 'no' in quotes"),
        ("On", "On could be true or text"),
        ("a: [en, no]", "line 1: no could be"),
        ("012", "012 begins with a zero: write 12, 0o"),
        ("-007.5", "begins with a zero"),
        ("a: 1\nname: {{ name }}", "line 2: a key must be text or a number; is this a {{ template }}"),
    ],
)
def test_ambiguous_yaml_values_are_refused(written, message):
    with pytest.raises(SettingsError) as caught:
        read_yaml(written)
    assert message in str(caught.value)


PLAIN_TEXT = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | PLAIN_TEXT,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PLAIN_TEXT, inner),
    )
)
def test_any_value_written_as_yaml_reads_back_equal(value):
    assert read_yaml(write_yaml(value)) == value


@pytest.mark.parametrize(
    "text", ["yes", "NO", "on", "012", "-00", "1e3", "1e-3", "true", "~", "", "0o17", "1_0", ".5", "<<"]
)
def test_text_that_looks_like_a_value_is_written_in_quotes(text):
    assert read_yaml(write_yaml([text])) == [text]


def test_numbers_in_powers_of_ten_are_integers_and_other_units_are_explained(path):
    assert load(Outer, path, ["steps=1e3"]).steps == 1000
    with pytest.raises(ConfigError, match=r"steps: .*got '1k'; write the number out, .* suffix 'k' is not accepted"):
        load(Outer, path, ["steps=1k"])
    with pytest.raises(ConfigError, match=r"name: .*string \(got 1000.0; put it in quotes if it is text\)"):
        load(Outer, path, ["name=1e3"])
    with pytest.raises(ConfigError, match=r"override 'steps=012': .* begins with a zero"):
        load(Outer, path, ["steps=012"])


def test_a_hint_never_names_the_key_that_was_given(path):
    with pytest.raises(ConfigError) as caught:
        load(Outer, path, ["shape={kind: square, side: 1, radius: 2}"])
    assert "did you mean 'shape.radius'" not in str(caught.value)


def test_hint_names_the_first_of_several_matching_keys(path):
    class Both(Config):
        first: Inner = Inner()
        second: Inner = Inner()

    with pytest.raises(ConfigError, match=r"unknown key 'rates': did you mean 'first\.rate'\?"):
        parse(Both, {"rates": 1})


def test_control_characters_in_yaml_are_refused():
    with pytest.raises(SettingsError, match="special characters are not allowed"):
        read_yaml("a: \x00")


def test_yaml_is_written_in_order_and_readable():
    assert write_yaml({"b": "café", "a": 1}) == "b: café\na: 1\n"
