"""Docstrings of fields, read from the source, equal those that pydantic finds for the same classes."""

from __future__ import annotations

from typing import ClassVar

import pytest
from pydantic import BaseModel, ConfigDict

from bst_base.documented import documentation
from bst_base.settings import Config, fields
from bst_dist.config import Recipe
from data_pipeline.sources import SOURCES


class Told(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    first: int = 1
    """What it is,
    over two lines."""
    untold: int = 2
    """"""
    silent: int = 3
    number: ClassVar[int] = 4

    class Inner(BaseModel):
        model_config = ConfigDict(use_attribute_docstrings=True)

        deep: str = ""
        """Within another."""

    def method(self) -> None:
        """Not the string of a field."""


class Heir(Told):
    silent: int = 3
    """Now it speaks."""
    last: float = 0
    """The end of the class."""


def local() -> type[BaseModel]:
    class Heir(BaseModel):
        model_config = ConfigDict(use_attribute_docstrings=True)

        last: float = 0
        """Of another class of this name."""

    return Heir


@pytest.mark.parametrize("cls", [Told, Told.Inner, Heir, local()], ids=lambda cls: cls.__qualname__)
def test_field_documentation_equals_that_of_pydantic(cls):
    expected = {
        name: " ".join(field.description.split()) for name, field in cls.model_fields.items() if field.description
    }
    assert {name: text for name, text in documentation(cls).items() if text} == expected
    assert expected


def test_class_without_source_has_no_documentation():
    made = type("Made", (Config,), {"__module__": "builtins"})
    assert documentation(made) == {}


@pytest.mark.parametrize("cls", [Recipe, *SOURCES.values()], ids=lambda cls: cls.__name__)
def test_every_setting_has_a_description(cls):
    assert [name for name, *_, text in fields(cls) if not text] == []
