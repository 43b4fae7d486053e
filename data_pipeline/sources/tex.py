r"""A small TeX reader: finds a paper's main file, resolves its inputs, and handles its comments and its encoding.

A file is split into tokens in one pass, and all else works on the tokens. The meaning of a `%`, an `\input` or an
`\end{document}` depends on the text before it (a comment, verbatim text, an address). Tokenizing takes linear time for
any input. pylatexenc parses more than is needed here (arguments, modes), in pure Python, one character at a time. It
also treats a `%` in the address of a `\url` as a comment.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Literal, NamedTuple

_ENCODING = re.compile(r"\\(?:usepackage\s*\[([^\]]*)\]\s*\{inputenc\}|inputencoding\s*\{([^}]*)\})")
_ENCODINGS = {
    "latin1": "latin-1",
    "ansinew": "cp1252",
    "cp1252": "cp1252",
    "latin2": "iso8859-2",
    "latin5": "iso8859-9",
    "latin9": "iso8859-15",
    "applemac": "mac-roman",
    "cp1250": "cp1250",
    "cp1251": "cp1251",
    "koi8-r": "koi8-r",
}
_VERBATIM = r"verbatim\*?|[BL]?Verbatim\*?|lstlisting|minted|alltt|filecontents\*?"
_SIGN = re.compile(
    rf"""
      (?P<line>(?m:^)[ \t]*%[^\n]*(?:\n|\Z))                 # a line that is nothing but a comment
    | (?P<comment>%[^\n]*)
    | (?P<note>(?m:^)[ \t]*\\begin\s*\{{comment\}}|\\begin\s*\{{comment\}})
    | \\begin\s*\{{(?P<verbatim>{_VERBATIM})\}}
    | \\(?:verb\*?|lstinline(?:\[[^\]\n]*\])?|mintinline\{{\w*\}}|url|path|nolinkurl)[ ]*(?P<mark>[^\w\s*{{}}\\%\[])
    | \\(?:url|path|nolinkurl|href|lstinline(?:\[[^\]\n]*\])?|mintinline\{{\w*\}})\s*(?P<braces>\{{)
    | \\(?P<input>input|include|subfile)(?![A-Za-z@])\s*(?:\{{(?P<braced>[^{{}}%\n]+)\}}|(?P<bare>[^\s{{}}\\%]+))
    | \\(?P<class>document(?:class|style))\b
    | \\end\s*\{{(?P<end>document)\}}
    | \\[^A-Za-z\n]                                           # one character: \% and \\ among them
    """,
    re.VERBOSE | re.DOTALL,
)
_USUAL_NAMES = ("main", "ms", "paper", "article", "manuscript", "root")


class Token(NamedTuple):
    """A piece of a file."""

    kind: Literal["text", "line", "comment", "class", "input", "end"]
    """`line`: a line with only a comment, or a comment environment; `comment`: from a `%` to the end of the line."""
    text: str
    target: str = ""
    """The file that an input names."""


def tokens(text: str) -> Iterator[Token]:
    """Yield the pieces of the file; joined, they are the whole file. Verbatim text and addresses count as text."""
    start = place = 0
    missing: set[str] = set()
    while match := _SIGN.search(text, place):
        kind, place = match.lastgroup, match.end()
        if kind in ("verbatim", "note", "mark", "braces"):
            end = _end_of_raw(text, match, missing)
            if kind != "note" or end == place:  # an unclosed comment environment counts as text
                place = end
                continue
            place, kind = end, "line"
        if kind is None:
            continue
        yield Token("text", text[start : match.start()])
        named = match["braced"] or match["bare"] or ""
        yield Token("input" if named else kind, text[match.start() : place], named)
        start = place
    yield Token("text", text[start:])


def _end_of_raw(text: str, match: re.Match[str], missing: set[str]) -> int:
    """Return the end of text that TeX does not interpret (verbatim, addresses).

    If it is not closed, return the end of `match`.
    """
    begin = match.end()
    if match["mark"] or match["braces"]:
        line_end = text.find("\n", begin)
        stop = len(text) if line_end < 0 else line_end
        end = text.find(match["mark"], begin, stop) + 1 if match["mark"] else _closing_brace(text, begin, stop)
        return end or begin
    close = f"\\end{{{match['verbatim'] or 'comment'}}}"
    end = -1 if close in missing else text.find(close, begin)
    if end < 0:
        missing.add(close)  # searched only once, so that a file with a thousand unclosed ones is still read in one pass
        return begin
    end += len(close)
    if match["note"]:  # it includes the rest of its last line if that is blank
        rest = re.compile(r"[ \t]*\n").match(text, end)
        end = rest.end() if rest else end
    return end


def _closing_brace(text: str, begin: int, stop: int) -> int:
    """Return the position after the brace that closes the one before `begin`; 0 when it is not closed on its line."""
    depth, place = 1, begin
    while place < stop:
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        place += 2 if text[place] == "\\" else 1
        if depth == 0:
            return place
    return 0


def find_main_file(files: dict[str, str]) -> str | None:
    """Return the name of the file that TeX is run on; None when no file declares a document class.

    If several do, the order of preference is: a file that no other file inputs; one with a usual name; the one nearest
    to the top directory; the longest one.
    """
    cut = {name: list(tokens(text)) for name, text in files.items()}
    candidates = [name for name, pieces in cut.items() if any(piece.kind == "class" for piece in pieces)]
    inputs = {
        _resolve(piece.target, name, files) for name, pieces in cut.items() for piece in pieces if piece.kind == "input"
    }
    return min(
        candidates,
        key=lambda name: (
            name in inputs,
            PurePosixPath(name).stem.lower() not in _USUAL_NAMES,
            name.count("/"),
            -len(files[name]),
            name,
        ),
        default=None,
    )


def paper_text(main: str, files: dict[str, str], comments: Literal["keep", "strip"]) -> str:
    r"""Return the main file with its inputs in their places, at any depth.

    A file is inserted at its first \input; later ones stay as they are written. So each file's text occurs once, and
    the paper is never longer than its files, even if they input each other.
    """
    found: list[str] = []
    used = {main}
    pending = [_pieces(files[main], comments)]
    while pending:
        piece = next(pending[-1], None)
        if piece is None:
            pending.pop()
            continue
        target = _resolve(piece.target, main, files) if piece.kind == "input" else None
        if target is None or target in used:
            found.append(piece.text)
        else:
            used.add(target)
            pending.append(_pieces(files[target], comments))
    return "".join(found)


def strip_comments(text: str) -> str:
    """Remove comment lines, the text after a `%`, comment environments, and all text after the end of the document.

    The `%` itself stays if text stands before it on its line, since it also hides the line break. Verbatim text is
    kept.
    """
    return "".join(piece.text for piece in _without_comments(tokens(text)))


def _pieces(text: str, comments: Literal["keep", "strip"]) -> Iterator[Token]:
    return tokens(text) if comments == "keep" else _without_comments(tokens(text))


def _without_comments(pieces: Iterable[Token]) -> Iterator[Token]:
    for piece in pieces:
        if piece.kind == "end":
            yield Token("end", piece.text + "\n")
            return
        if piece.kind == "comment":
            yield Token("comment", "%")
        elif piece.kind != "line":
            yield piece


def decode_tex(data: bytes) -> str | bytes:
    """Return a TeX file's text.

    If it is neither UTF-8 nor in an encoding that it declares, return its bytes unchanged.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        for match in _ENCODING.finditer(data.decode("latin-1")):
            if codec := _ENCODINGS.get((match[1] or match[2]).strip().lower()):
                return data.decode(codec, errors="replace")
        return data


def _resolve(argument: str, main: str, files: dict[str, str]) -> str | None:
    """Return the file that an input's argument names.

    TeX looks in the main file's directory, with and without `.tex`.
    """
    base = PurePosixPath(main).parent / argument.strip().strip('"').removeprefix("./")
    return next((name for name in (f"{base}.tex", str(base)) if name in files), None)
