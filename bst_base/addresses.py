"""Addresses of data, and the secrets in them: `https://user:password@host/…`, `https://host/…?sig=…`.

An address is written into the run directory, the log and the metrics. So a secret in it must be named by an environment
variable, `https://host/books?sig=$BOOKS_SIG`, and takes its place only where the store is asked.
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
"""Names of settings that hold secrets."""

_PASSWORD = re.compile(r"[\w+.-]+://[^/?#@\s'\"]*?:(?P<value>[^/?#\s'\"]*)(?=@)")
_PARAMETER = re.compile(r"[?&](?P<name>[^=&#\s'\"]+)=(?P<value>[^&#\s'\"]*)")
_SIGNATURE = re.compile(r"(?i)^sig$|signature")
_VARIABLE = re.compile(r"\$\{?(\w+)\}?")


class Secret(NamedTuple):
    """A part of an address that nobody else is to read."""

    begin: int
    end: int
    value: str
    what: str


def secrets_in(text: str) -> list[Secret]:
    """Passwords of addresses, and the parameters of their queries that sign them, in their order."""
    if "://" not in text:
        return []
    found = [Secret(*each.span("value"), each["value"], "password") for each in _PASSWORD.finditer(text)]
    for each in _PARAMETER.finditer(text):
        if SECRET.search(each["name"]) or _SIGNATURE.search(each["name"]):
            found.append(Secret(*each.span("value"), each["value"], each["name"]))
    return sorted(found)


def no_secret(url: str) -> str:
    """The address; raises ValueError, which does not show it, for a secret in plain text."""
    plain = [secret for secret in secrets_in(url) if secret.value and not _VARIABLE.fullmatch(secret.value)]
    if plain:
        raise ValueError(
            f"{redacted(url)}: {', '.join(secret.what for secret in plain)} would be written into the run directory; "
            "put it into an environment variable and write $NAME here"
        )
    return url


def redacted(text: str) -> str:
    """A text with addresses in it, their secrets replaced by dots unless they are names of variables."""
    for secret in reversed(secrets_in(text)):
        if not _VARIABLE.fullmatch(secret.value):
            text = f"{text[: secret.begin]}…{text[secret.end :]}"
    return text


def filled(url: str) -> tuple[str, dict[str, str]]:
    """(the address with its secrets, how each secret is called in what people read).

    Raises UserError for a variable that is not set.
    """
    hidden: dict[str, str] = {}
    for secret in reversed(secrets_in(url)):
        value, name = secret.value, "…"
        if variable := _VARIABLE.fullmatch(value):
            if variable[1] not in os.environ:
                raise UserError(f"{url}: the environment variable {variable[1]} is not set")
            value, name = os.environ[variable[1]], value
        forms = {value, quote(value, safe=""), unquote(value)}  # clients write addresses in several ways
        hidden |= {form: name for form in forms if form}
        if variable:
            value = quote(value, safe="") if secret.what == "password" else value
            url = url[: secret.begin] + value + url[secret.end :]
    return url, hidden


CorpusAddress: TypeAlias = Annotated[Address, AfterValidator(no_secret)]
"""A directory, or the address of one without secrets in plain text."""
