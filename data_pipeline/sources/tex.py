"""What must be understood of TeX to read a paper: its main file, what it inputs, its comments, its encoding."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

_CLASS = re.compile(r"^[^%\n]*\\document(class|style)\b", re.MULTILINE)
_INPUT = re.compile(r"\\(?:input|include)\s*(?:\{([^{}]+)\}|([^\s{}\\%]+))")
_ENCODING = re.compile(r"\\(?:usepackage\s*\[([^\]]*)\]\s*\{inputenc\}|inputencoding\s*\{([^}]*)\})")
_ENCODINGS = {
    "latin1": "latin-1", "ansinew": "cp1252", "cp1252": "cp1252", "latin2": "iso8859-2", "latin5": "iso8859-9",
    "latin9": "iso8859-15", "applemac": "mac-roman", "cp1250": "cp1250", "cp1251": "cp1251", "koi8-r": "koi8-r",
}  # fmt: skip
_COMMENTS = re.compile(
    r"(?P<verbatim>\\begin\{(?P<name>verbatim\*?|Verbatim|lstlisting|minted)\}.*?\\end\{(?P=name)\})"
    r"|^[ \t]*\\begin\{comment\}.*?\\end\{comment\}[ \t]*\n?"
    r"|^[ \t]*%[^\n]*(?:\n|\Z)"
    r"|(?<!\\)(?P<sign>(?:\\\\)*%)[^\n]+",
    re.DOTALL | re.MULTILINE,
)
_END = "\\end{document}"
_USUAL_NAMES = ("main", "ms", "paper", "article", "manuscript", "root")


def find_main_file(files: dict[str, str]) -> str | None:
    """The name of the file that TeX is run on; None when no file declares a document class.

    Of several that do, one that no other inputs; then one with a usual name; then the nearest to the top; then the
    longest.
    """
    candidates = [name for name, text in files.items() if _CLASS.search(text)]
    inputs = {target for name, text in files.items() for target in _targets(name, text, files)}
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


def inline_inputs(main: str, files: dict[str, str]) -> str:
    """The main file with every \\input and \\include of a file that is there replaced by that file, in depth."""

    def inline(name: str, above: tuple[str, ...]) -> str:
        def replace(match: re.Match[str]) -> str:
            target = _resolve(match[1] or match[2], main, files)
            return match[0] if target is None or target in above else inline(target, (*above, target))

        return _INPUT.sub(replace, files[name])

    return inline(main, (main,))


def strip_comments(text: str) -> str:
    """The text without comments: whole comment lines, what follows a `%`, comment environments, what follows the end.

    The `%` itself stays where text stands before it, since it also swallows the line's end. Verbatim text is kept.
    """
    head, end, _ = text.partition(_END)
    head = _COMMENTS.sub(lambda match: match["verbatim"] or match["sign"] or "", head)
    return head + (end + "\n" if end else "")


def decode_tex(data: bytes) -> str | bytes:
    """A TeX file's text; its bytes as they are when they are neither UTF-8 nor in the encoding that it declares."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        for match in _ENCODING.finditer(data.decode("latin-1")):
            if codec := _ENCODINGS.get((match[1] or match[2]).strip().lower()):
                return data.decode(codec, errors="replace")
        return data


def _targets(name: str, text: str, files: dict[str, str]) -> set[str]:
    found = (_resolve(match[1] or match[2], name, files) for match in _INPUT.finditer(text))
    return {target for target in found if target is not None}


def _resolve(argument: str, main: str, files: dict[str, str]) -> str | None:
    """The file that an input's argument means: TeX looks from the main file's directory, with and without `.tex`."""
    base = PurePosixPath(main).parent / argument.strip().strip('"').removeprefix("./")
    return next((name for name in (f"{base}.tex", str(base)) if name in files), None)
