"""Papers from arXiv's archives: the main file is found, inputs are inserted, comments follow the policy."""

from __future__ import annotations

import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bst_base.errors import UserError
from data_pipeline.sources.arxiv import Arxiv
from data_pipeline.sources.tex import decode_tex, find_main_file, paper_text, strip_comments, tokens

MAIN = "\\documentclass{article}\n\\begin{document}\n\\input{sec/intro}\n\\include{end.tex}\n\\end{document}\n"
PAPER = {"paper.tex": MAIN.encode(), "sec/intro.tex": b"Intro % secret\n", "end.tex": b"End.", "fig.png": b"\x89PNG"}


def test_bulk_archive_gives_one_document_per_paper(read_all, put, make_tar) -> None:
    bulk = make_tar(
        {
            "0704/0704.0001.gz": gzip.compress(make_tar(PAPER)),
            "0704/0704.0002.gz": gzip.compress(b"\\documentstyle{article} one file"),
            "0704/0704.0003.pdf": b"%PDF",
            "0704/hep-th9901001.gz": gzip.compress(make_tar({"x.ps": b"%!PS"})),
        }
    )
    documents, skipped = read_all("arxiv", path=put({"arXiv_src_0704_001.tar": bulk}))
    assert [(d.path, d.content) for d in documents] == [
        ("0704/0704.0001", "\\documentclass{article}\n\\begin{document}\nIntro %\n\nEnd.\n\\end{document}\n"),
        ("0704/0704.0002", "\\documentstyle{article} one file"),
    ]
    assert skipped == {
        "0704/0704.0001.gz/*.png": "ending .png",
        "arXiv_src_0704_001.tar/0704/0704.0003.pdf": "no TeX source",
        "0704/hep-th9901001.gz/*.ps": "ending .ps",
        "0704/hep-th9901001.gz": "no TeX source",
    }


def test_single_submissions_are_read_in_every_file_format(read_all, put, make_tar) -> None:
    root = put(
        {
            "a.tar.gz": make_tar(PAPER, "w:gz"),
            "b.gz": gzip.compress(b"\\documentclass{x} b"),
            "c.tex": "\\bye c",
        }
    )
    documents, _ = read_all("arxiv", path=root, comments="keep")
    assert [d.path for d in documents] == ["a", "b", "c"]
    assert "Intro % secret" in documents[0].content


def test_archive_members_with_unsafe_paths_are_skipped_and_named(read_all, put, make_tar) -> None:
    paper = make_tar(
        {"../../etc/x.tex": b"\\documentclass{x}", "link.tex": "-> /etc/passwd", "ok.tex": b"\\documentclass{x}"}
    )
    documents, skipped = read_all("arxiv", path=put({"p.gz": gzip.compress(paper)}))
    assert [d.content for d in documents] == ["\\documentclass{x}"]
    assert skipped == {
        "p.gz/../../etc/x.tex": "unsafe member name",
        "p.gz/link.tex": "link or special file in an archive (to '/etc/passwd')",
    }


@pytest.mark.parametrize("cut", [100, 700])
def test_truncated_archive_is_refused_by_name(read_all, put, make_tar, cut: int) -> None:
    whole = make_tar({"0704/0704.0001.gz": gzip.compress(make_tar(PAPER))})
    with pytest.raises(UserError, match=r"arXiv_src\.tar.*damaged or cut short"):
        read_all("arxiv", path=put({"arXiv_src.tar": whole[:cut]}))
    with pytest.raises(UserError, match=r"p\.gz: damaged or cut short"):
        read_all("arxiv", path=put({"p.gz": gzip.compress(make_tar(PAPER))[: cut // 4]}, under="other"))


@pytest.mark.parametrize(
    ("files", "main"),
    [
        ({"a.tex": "text", "b.tex": "\\documentclass{x}"}, "b.tex"),
        ({"a.tex": "% \\documentclass{x}", "b.tex": "text"}, None),
        ({"a.tex": "\\documentclass{x}", "ms.tex": "\\documentclass{x}"}, "ms.tex"),
        ({"main.tex": "\\documentclass{x}", "top.tex": "\\documentclass{x}\\input{main}"}, "top.tex"),
        ({"old/a.tex": "\\documentclass{x} longer", "z.tex": "\\documentclass{x}"}, "z.tex"),
        ({"a.tex": "\\documentclass{x}", "b.tex": "\\documentclass{x} longer"}, "b.tex"),
    ],
)
def test_main_file_of_a_paper_is_found(files: dict[str, str], main: str | None) -> None:
    assert find_main_file(files) == main


def test_nested_inputs_are_inserted_and_cycles_are_broken() -> None:
    files = {
        "d/m.tex": "\\input a and \\input{./b} \\input{missing}",
        "d/a.tex": "A\\input{b}",
        "d/b.tex": "B\\input{a}",
    }
    assert paper_text("d/m.tex", files, "strip") == "AB\\input{a} and \\input{./b} \\input{missing}"


def test_each_input_file_is_inserted_at_most_once() -> None:
    files = {f"{i}.tex": f"<{i}>\\input{{{i + 1}}}\\input{{{i + 1}}}" for i in range(2000)} | {"2000.tex": "end"}
    text = paper_text("0.tex", files, "strip")
    assert all(text.count(f"<{i}>") == 1 for i in range(2000))
    assert len(text) <= sum(map(len, files.values()))


@pytest.mark.parametrize("comments", ["keep", "strip"])
def test_commands_in_comments_or_verbatim_text_are_ignored(comments: str) -> None:
    files = {
        "m.tex": "a\n% \\input{x}\n\\verb|\\input{x}|\n% \\end{document}\n"
        "\\verb|\\end{document}| b \\includegraphics{x}",
        "graphics.tex": "G",
        "x.tex": "X",
    }
    text = paper_text("m.tex", files, comments)
    assert "X" not in text and "G" not in text
    assert text.endswith("b \\includegraphics{x}")
    assert ("% \\input{x}" in text) == (comments == "keep")


@pytest.mark.parametrize(
    ("text", "stripped"),
    [
        ("a % b\nc", "a %\nc"),
        ("  % whole line\nkept", "kept"),
        (r"50\% of it", r"50\% of it"),
        ("line\\\\% comment", "line\\\\%"),
        ("%\n%% x", ""),
        ("\\begin{verbatim}\n% kept\n\\end{verbatim} % gone", "\\begin{verbatim}\n% kept\n\\end{verbatim} %"),
        ("a\n\\begin{comment}\nx\n\\end{comment}\nb", "a\nb"),
        ("x\\end{document}\nnotes to self", "x\\end{document}\n"),
        ("a\n% \\end{document}\nb \\end{document} c", "a\nb \\end{document}\n"),
        ("\\verb|\\end{document}| tail", "\\verb|\\end{document}| tail"),
        ("\\url{http://x/a%20b} tail % c", "\\url{http://x/a%20b} tail %"),
        ("\\url|a%20b| and \\href{a%{x}b}{c} tail", "\\url|a%20b| and \\href{a%{x}b}{c} tail"),
        ("\\verb*+50% off+ tail % c", "\\verb*+50% off+ tail %"),
        ("\\lstinline[language=C]{a % b} tail", "\\lstinline[language=C]{a % b} tail"),
        ("\\verb|not closed % c\nb", "\\verb|not closed %\nb"),
        ("\\begin{verbatim} 50% \\end{verbatim*}\nb", "\\begin{verbatim} 50%\nb"),
        (
            "\\begin{lstlisting}\n\\end{document} % k\n\\end{lstlisting}x",
            "\\begin{lstlisting}\n\\end{document} % k\n\\end{lstlisting}x",
        ),
        ("\\\\%c\n\\\\\\% kept", "\\\\%\n\\\\\\% kept"),
    ],
)
def test_stripping_removes_only_comments(text: str, stripped: str) -> None:
    assert strip_comments(text) == stripped


def test_declared_encoding_is_used_for_bytes_that_are_not_utf8() -> None:
    head = b"\\usepackage[latin1]{inputenc} "
    assert decode_tex(head + b"\xe9") == head.decode() + "é"
    assert decode_tex(head + "é".encode()) == head.decode() + "é"
    assert decode_tex(b"\xe9") == b"\xe9"


SIGNS = [
    "\\verb|",
    "|",
    "%",
    "\n",
    "a ",
    "\\url{",
    "}",
    "{",
    "\\\\",
    "\\",
    "\\begin{verbatim}",
    "\\end{verbatim}",
    "\\begin{comment}",
    "\\end{comment}",
    "\\input{x}",
    "\\input x ",
    "\\end{document}",
]


@given(st.lists(st.sampled_from(SIGNS)))
def test_tex_tokens_joined_equal_the_text(pieces: list[str]) -> None:
    text = "".join(pieces)
    assert "".join(token.text for token in tokens(text)) == text


def test_damaged_paper_in_a_bulk_archive_is_named_and_others_are_read(put, make_tar) -> None:
    papers = {f"07/{i}.gz": gzip.compress(b"\\documentclass{x} %d" % i) for i in range(3)}
    papers["07/1.gz"] = papers["07/1.gz"][:-6]
    source = Arxiv(path=put({"a.tar": make_tar(papers)}))
    found = [item for part in source.listing().parts for item in source.read(part)]
    assert [getattr(item, "content", None) for item in found] == ["\\documentclass{x} 0", None, "\\documentclass{x} 2"]
    assert found[1].bad and "07/1.gz" in found[1].path
