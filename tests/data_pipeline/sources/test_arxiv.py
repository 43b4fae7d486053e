"""Papers come out of arXiv's archives whole: main file found, inputs in place, comments as the policy says."""

from __future__ import annotations

import gzip

import pytest

from bst_base.errors import UserError
from data_pipeline.sources.tex import decode_tex, find_main_file, inline_inputs, strip_comments

MAIN = "\\documentclass{article}\n\\begin{document}\n\\input{sec/intro}\n\\include{end.tex}\n\\end{document}\n"
PAPER = {"paper.tex": MAIN.encode(), "sec/intro.tex": b"Intro % secret\n", "end.tex": b"End.", "fig.png": b"\x89PNG"}


def test_a_bulk_archive_gives_a_document_a_paper(read_all, put, make_tar) -> None:
    bulk = make_tar({
        "0704/0704.0001.gz": gzip.compress(make_tar(PAPER)),
        "0704/0704.0002.gz": gzip.compress(b"\\documentstyle{article} one file"),
        "0704/0704.0003.pdf": b"%PDF",
        "0704/hep-th9901001.gz": gzip.compress(make_tar({"x.ps": b"%!PS"})),
    })  # fmt: skip
    documents, skipped = read_all("arxiv", path=put({"arXiv_src_0704_001.tar": bulk}))
    assert [(d.path, d.content) for d in documents] == [
        ("0704/0704.0001", "\\documentclass{article}\n\\begin{document}\nIntro %\n\nEnd.\n\\end{document}\n"),
        ("0704/0704.0002", "\\documentstyle{article} one file"),
    ]
    assert skipped == {
        "arXiv_src_0704_001.tar/0704/0704.0003.pdf": "no TeX source",
        "0704/hep-th9901001.gz": "no TeX source",
    }


def test_single_submissions_are_read_in_each_of_their_forms(read_all, put, make_tar) -> None:
    root = put({
        "a.tar.gz": make_tar(PAPER, "w:gz"), "b.gz": gzip.compress(b"\\documentclass{x} b"), "c.tex": "\\bye c",
    })  # fmt: skip
    documents, _ = read_all("arxiv", path=root, comments="keep")
    assert [d.path for d in documents] == ["a", "b", "c"]
    assert "Intro % secret" in documents[0].content


def test_a_member_that_leads_out_of_its_archive_is_skipped_by_name(read_all, put, make_tar) -> None:
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
def test_a_truncated_archive_is_named(read_all, put, make_tar, cut: int) -> None:
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
def test_the_main_file_is_found(files: dict[str, str], main: str | None) -> None:
    assert find_main_file(files) == main


def test_inputs_are_put_in_place_in_depth_and_circles_end() -> None:
    files = {
        "d/m.tex": "\\input a and \\input{./b} \\input{missing}",
        "d/a.tex": "A\\input{b}",
        "d/b.tex": "B\\input{a}",
    }
    assert inline_inputs("d/m.tex", files) == "AB\\input{a} and BA\\input{b} \\input{missing}"


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
    ],
)
def test_comments_are_stripped_and_nothing_else(text: str, stripped: str) -> None:
    assert strip_comments(text) == stripped


def test_a_declared_encoding_is_used_when_the_bytes_are_not_utf8() -> None:
    head = b"\\usepackage[latin1]{inputenc} "
    assert decode_tex(head + b"\xe9") == head.decode() + "é"
    assert decode_tex(head + "é".encode()) == head.decode() + "é"
    assert decode_tex(b"\xe9") == b"\xe9"
