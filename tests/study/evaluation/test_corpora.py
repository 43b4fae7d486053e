from __future__ import annotations

import json
import shutil

import pytest

from bst_base.errors import UserError
from bst_base.settings import parse
from bst_dist.study.evaluation.corpora import open_text
from bst_dist.study.evaluation.trained import OtherTokenizerError, open_run, tokenizer_of
from bst_dist.train.rundir import ENVIRONMENT
from data_pipeline.prepare.config import PrepareConfig
from data_pipeline.prepare.corpus import prepare
from data_pipeline.prepare.parallel import open_workers
from data_pipeline.serve.reader import Corpus


@pytest.fixture(scope="module")
def make_corpus(tmp_path_factory, texts):
    """Makes a corpus of the reversed texts: the same sizes, and its own tokenizer unless one is given."""

    def make(**tokenizer) -> str:
        folder, output = tmp_path_factory.mktemp("texts"), tmp_path_factory.mktemp("prepared") / "other"
        for name, text in texts.items():
            (folder / name).write_text(text[::-1])
        settings = {
            "source": {"kind": "folder", "path": str(folder), "pattern": "*.txt"},
            "output": str(output),
            "tokenizer": {"vocab_size": 320, **tokenizer},
            "validation_fraction": 0.2,
        }
        with open_workers(1) as workers:
            prepare(parse(PrepareConfig, settings), workers, lambda *_: None)
        return str(output)

    return make


def record(run_dir, sha256: str) -> None:
    starts = [{"ranks": 1}, {"ranks": 1, "tokenizer_sha256": sha256}]
    (run_dir / ENVIRONMENT).write_text(json.dumps({"starts": starts}))


def test_another_corpus_of_the_same_tokenizer_is_read(make_run, make_corpus, corpus):
    trained, other = open_run(make_run()), make_corpus(reuse=str(corpus))
    (opened,) = open_text(trained, "validation", other)
    assert opened.storage.where == other
    (own,) = open_text(trained, "validation")
    assert own.storage.where == str(corpus)


def test_missing_corpus_error_names_its_path_and_another_path_works(make_run, corpus, tmp_path):
    run_dir = make_run()
    moved = tmp_path / "moved"
    shutil.copytree(corpus, moved)
    path = run_dir / "recipe.yaml"
    path.write_text(path.read_text().replace(str(corpus), str(tmp_path / "gone")))
    (run_dir / "tokenizer.model").write_bytes((corpus / "tokenizer.model").read_bytes())
    trained = open_run(run_dir)
    with pytest.raises(UserError, match=rf"looked in {tmp_path}/gone for manifest.json\).*name it with --corpus"):
        open_text(trained, "validation")
    assert open_text(trained, "validation", str(moved))
    assert tokenizer_of(run_dir, trained.recipe).encode("def").size


def test_another_tokenizer_of_the_same_size_is_refused(make_run, make_corpus, corpus):
    trained, other = open_run(make_run()), make_corpus()
    assert Corpus.open(other).manifest.tokenizer.vocab_size == 320
    with pytest.raises(OtherTokenizerError, match="its ids mean something else to this model"):
        open_text(trained, "validation", other)


def test_corpus_prepared_again_with_another_tokenizer_is_refused(make_run, corpus):
    run_dir = make_run()
    record(run_dir, Corpus.open(str(corpus)).manifest.tokenizer.sha256)
    assert open_text(open_run(run_dir), "validation")
    record(run_dir, "0" * 64)
    with pytest.raises(OtherTokenizerError, match=r"is not the one that .* was trained with \(000000000000"):
        open_text(open_run(run_dir), "validation")
    with pytest.raises(OtherTokenizerError):
        tokenizer_of(run_dir, open_run(run_dir).recipe)
