"""Addresses of data, and the secrets in them: `https://user:password@host/…`, `https://host/…?sig=…`.

An address is written into the run directory, the log and the metrics. So a secret in it must be given as the name of an
environment variable, `https://host/books?sig=$BOOKS_SIG`. The value is only inserted when the store is accessed.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, NamedTuple, TypeAlias
from urllib.parse import quote, unquote

from pydantic import AfterValidator

from bst_base.errors import UserError
from bst_base.places import Address

SECRET = re.compile(
    r"(?i)^key$|secret|token|passw|passphrase|access_?key|account_?key|api_?key|private_?key|sas_|connection_string|"
    r"credential|authorization|cookie"
)
"""Matches names of settings that hold secrets."""

_PASSWORD = re.compile(r"[\w+.-]+://[^/?#@\s'\"]*?:(?P<value>[^/?#\s'\"]*)(?=@)")
_PARAMETER = re.compile(r"[?&](?P<name>[^=&#\s'\"]+)=(?P<value>[^&#\s'\"]*)")
_SIGNATURE = re.compile(r"(?i)^sig$|signature")
_VARIABLE = re.compile(r"\$\{?(\w+)\}?")


class Secret(NamedTuple):
    """A secret part of an address."""

    begin: int
    end: int
    value: str
    what: str


def secrets_in(text: str) -> list[Secret]:
    """Return the passwords in addresses, and the query parameters that sign them, in order."""
    if "://" not in text:
        return []
    found = [Secret(*each.span("value"), each["value"], "password") for each in _PASSWORD.finditer(text)]
    for each in _PARAMETER.finditer(text):
        if SECRET.search(each["name"]) or _SIGNATURE.search(each["name"]):
            found.append(Secret(*each.span("value"), each["value"], each["name"]))
    return sorted(found)


def no_secret(url: str) -> str:
    """Return the address; raises ValueError, with a message that hides the secret, if it has one in plain text."""
    plain = [secret for secret in secrets_in(url) if secret.value and not _VARIABLE.fullmatch(secret.value)]
    if plain:
        raise ValueError(
            f"{redacted(url)}: {', '.join(secret.what for secret in plain)} would be written into the run directory; "
            "put it into an environment variable and write $NAME here"
        )
    return url


def redacted(text: str) -> str:
    """Return the text with the secrets in its addresses replaced by dots. Names of variables stay."""
    for secret in reversed(secrets_in(text)):
        if not _VARIABLE.fullmatch(secret.value):
            text = f"{text[: secret.begin]}…{text[secret.end :]}"
    return text


def filled(url: str) -> tuple[str, dict[str, str]]:
    """Return (the address with its secrets, a dict: secret -> the name to show instead of it).

    Raises UserError for a variable that is not set.
    """
    hidden: dict[str, str] = {}
    shown = redacted(url)
    for secret in reversed(secrets_in(url)):
        value, name = secret.value, "…"
        if variable := _VARIABLE.fullmatch(value):
            if variable[1] not in os.environ:
                raise UserError(f"{shown}: the environment variable {variable[1]} is not set")
            value, name = os.environ[variable[1]], value
        forms = {value, quote(value, safe=""), unquote(value)}  # clients quote addresses in different ways
        hidden |= {form: name for form in forms if form}
        if variable:
            value = quote(value, safe="") if secret.what == "password" else value
            url = url[: secret.begin] + value + url[secret.end :]
    return url, hidden


CorpusAddress: TypeAlias = Annotated[Address, AfterValidator(no_secret)]
"""A directory, or the address of one, without secrets in plain text."""
