"""Reading from servers, object stores, commands and the cache, with and without failures."""

from __future__ import annotations

import asyncio
import base64
import errno
import fcntl
import hashlib
import itertools
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import botocore.exceptions
import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from bst_base.errors import StorageError, UserError
from bst_base.settings import ConfigError, dump, parse
from bst_base.stopping import STOP_REQUESTED, Stopped
from data_pipeline.format.extents import shard_extents, to_bytes
from data_pipeline.format.manifest import ExtentsInfo, Manifest
from data_pipeline.format.shards import ShardError, ShardIndex
from data_pipeline.serve import rows
from data_pipeline.serve.config import DataConfig
from data_pipeline.serve.loader import Loader, open_corpora
from data_pipeline.serve.order import windows
from data_pipeline.serve.reader import Corpus
from data_pipeline.serve.share import Share
from data_pipeline.serve.slices import Blank
from data_pipeline.store import remote
from data_pipeline.store.base import REQUESTS, StorageConfig, StoreConfigError
from data_pipeline.store.storage import LocalStorage

LENGTHS = [20_000, 12, 700, 9_000, 5_000]
FAST = {"backoff_s": 0.01, "timeout_s": 0.3, "attempts": 4}
TAR = "train-000000.tar"


def assert_same_documents(found: Corpus, directory: Path) -> None:
    expected = Corpus.open(str(directory))
    assert len(found) == len(expected)
    for number in range(len(expected)):
        assert np.array_equal(found.document(number), expected.document(number))
        assert found.document_info(number) == expected.document_info(number)


@pytest.mark.parametrize("cached", [False, True])
def test_documents_over_http_equal_those_of_the_directory(
    make_corpus: Any, serve: Any, tmp_path: Path, cached: bool
) -> None:
    directory = make_corpus(LENGTHS)
    config = StorageConfig(**FAST, cache_dir=tmp_path / "cache" if cached else None)
    assert_same_documents(Corpus.open(serve(directory).url, "train", config), directory)


def test_only_the_needed_byte_range_is_requested(make_corpus: Any, serve: Any) -> None:
    server = serve(make_corpus(LENGTHS))
    corpus = Corpus.open(server.url, "train", StorageConfig(**FAST))
    server.requests.clear()
    corpus.tokens(0, 9_000, 9_100)
    (_, index_range), (name, span) = server.requests
    first, last = map(int, span.removeprefix("bytes=").split("-"))
    assert index_range is None and name == TAR
    assert last + 1 - first == 8192 * 2  # the block of 8192 tokens that the CRC is of


@pytest.mark.parametrize("fault", ["503", "stall", "drop"])
@pytest.mark.parametrize("cached", [False, True])
def test_temporary_faults_are_retried(make_corpus: Any, serve: Any, tmp_path: Path, fault: str, cached: bool) -> None:
    directory = make_corpus(LENGTHS)
    server = serve(directory)
    for file in ("manifest.json", "train-000000.idx", TAR):
        server.faults[file] = [fault, fault]
    config = StorageConfig(**FAST, cache_dir=tmp_path / "cache" if cached else None)
    assert_same_documents(Corpus.open(server.url, "train", config), directory)
    assert not any(server.faults.values())


@pytest.mark.parametrize("name", [TAR, "train-000000.idx", "tokenizer.model"])
def test_byte_changed_in_transfer_is_read_again_until_the_last_attempt(
    make_corpus: Any, serve: Any, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    directory = make_corpus(LENGTHS)
    server = serve(directory)
    faults = ["flip", "", "flip", "", "flip"]  # of the tar, the member's name is read between the attempts
    server.faults[name] = faults if name == TAR else ["flip"] * 3
    corpus = Corpus.open(server.url, "train", StorageConfig(**FAST))
    assert np.array_equal(corpus.document(0), Corpus.open(str(directory)).document(0))
    assert not server.faults[name]
    assert len([each for each in caplog.messages if f"{name}: changed bytes; trying again in 0.0 s" in each]) == 3


def test_changed_extents_file_is_read_again(make_corpus: Any, serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    directory = make_corpus(LENGTHS)
    indexes = [ShardIndex.read(path) for path in sorted(directory.glob("*.idx"))]
    data = to_bytes([shard_extents(index.lengths) for index in indexes])
    (directory / "train.extents").write_bytes(data)
    info = ExtentsInfo(file="train.extents", sha256=hashlib.sha256(data).hexdigest())
    Manifest.read(directory).model_copy(update={"extents": {"train": info}}).write(directory)
    server = serve(directory)
    server.faults["train.extents"] = ["flip"]
    corpus = Corpus.open(server.url, "train", StorageConfig(**FAST))
    assert corpus.shard_sizes(64).extents.tolist() == Corpus.open(str(directory)).shard_sizes(64).extents.tolist()
    assert not any(name.endswith(".idx") for name, _ in server.requests)
    assert not any("reading every index" in each for each in caplog.messages)


@pytest.mark.parametrize("fault", ["503", "stall", "drop"])
def test_permanent_fault_is_an_error_with_the_file_name(make_corpus: Any, serve: Any, fault: str) -> None:
    server = serve(make_corpus(LENGTHS))
    corpus = Corpus.open(server.url, "train", StorageConfig(**FAST))
    server.faults[TAR] = [fault] * 4
    with pytest.raises(StorageError, match=f"{TAR}: not read in 4 attempts"):
        corpus.document(0)


def test_byte_that_is_changed_at_every_attempt_is_an_error(make_corpus: Any, serve: Any) -> None:
    server = serve(make_corpus(LENGTHS))
    corpus = Corpus.open(server.url, "train", StorageConfig(**FAST))
    server.faults[TAR] = ["flip", ""] * 4
    with pytest.raises(ShardError, match=rf"{TAR}: 00000000.tok.npy: byte \d+ is 0x.. where 0x.. was written"):
        corpus.tokens(0, 0, 10)
    server.faults["train-000001.idx"] = ["flip"] * 4
    with pytest.raises(ShardError, match=r"train-000001\.idx: .*checksum does not match: the index is damaged"):
        corpus.document(len(corpus) - 1)
    assert not any(server.faults.values())


def test_missing_shard_on_the_server_is_requested_only_once(make_corpus: Any, serve: Any) -> None:
    directory = make_corpus(LENGTHS)
    server = serve(directory)
    corpus = Corpus.open(server.url, "train", StorageConfig(**FAST))
    (directory / TAR).unlink()
    with pytest.raises(ShardError, match=f"{TAR}: missing"):
        corpus.document(0)
    assert sum(name == TAR for name, _ in server.requests) == 1


def test_server_without_range_requests_is_refused_without_a_cache(make_corpus: Any, serve: Any) -> None:
    server = serve(make_corpus(LENGTHS))
    corpus = Corpus.open(server.url, "train", StorageConfig(**FAST))
    server.faults[TAR] = ["whole"]
    with pytest.raises(StoreConfigError, match=r"sends whole files.*storage\.cache_dir"):
        corpus.tokens(0, 0, 10)


def test_server_without_range_requests_works_with_a_cache(
    make_corpus: Any, serve: Any, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(remote, "_CHUNK", 10_000)
    directory = make_corpus(LENGTHS)
    server = serve(directory)
    server.faults[TAR] = ["whole"] * 99
    server.faults["train-000001.tar"] = ["", "whole", "whole"]  # a server that changes its behaviour
    config = StorageConfig(**FAST, cache_dir=tmp_path / "cache")
    assert_same_documents(Corpus.open(server.url, "train", config), directory)


def test_slow_read_reaches_the_deadline_and_stalled_read_can_be_interrupted(make_corpus: Any, serve: Any) -> None:
    server = serve(make_corpus(LENGTHS))
    config = StorageConfig(attempts=1, timeout_s=60, deadline_s=0.3)
    corpus = Corpus.open(server.url, "train", config)
    server.faults[TAR] = ["stall"] * 9
    with pytest.raises(StorageError, match=r"not done in 0\.3 s \(storage\.deadline_s\)"):
        corpus.document(0)
    corpus.storage._config = StorageConfig(attempts=1, timeout_s=60)
    threading.Timer(0.2, corpus.interrupt, [True]).start()
    with pytest.raises(Stopped, match="reading was interrupted"):
        corpus.document(0)


def test_wait_between_retries_can_be_interrupted(make_corpus: Any, serve: Any) -> None:
    server = serve(make_corpus(LENGTHS))
    corpus = Corpus.open(server.url, "train", StorageConfig(attempts=3, backoff_s=1000))
    server.faults[TAR] = ["503"]
    threading.Timer(0.2, corpus.interrupt, [True]).start()
    with pytest.raises(Stopped, match="reading was interrupted"):
        corpus.document(0)


@pytest.fixture
def told() -> Iterator[None]:
    """Signal the process to stop after 0.2 s."""
    timer = threading.Timer(0.2, STOP_REQUESTED.set)
    timer.start()
    yield
    timer.join()
    STOP_REQUESTED.clear()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_interrupted_loader_returns_a_blank_step(make_corpus: Any, serve: Any, told: None, prefetch: int) -> None:
    server = serve(make_corpus(LENGTHS))
    storage = {"timeout_s": 1000, "deadline_s": 1000}
    config = parse(DataConfig, {"corpus": server.url, "storage": storage, "prefetch": prefetch})
    share = Share(length=64, rows=4, micro_rows=2)
    loader = Loader(config, open_corpora(config), share, block=8, seed=0)
    whole = loader.batches(0)
    for file in (TAR, "train-000001.tar"):
        server.faults[file] = ["stall"] * 1000
    ((step, batches),) = loader
    loader.close()
    assert step == 0 and isinstance(batches, Blank)
    for blank, batch in zip(batches, whole, strict=True):
        assert not blank.loss_mask.any()
        assert all(getattr(blank, each).shape == getattr(batch, each).shape for each in ("input_ids", "labels"))
        assert all((getattr(blank, each) == getattr(batch, each)).all() for each in ("rows", "corpora", "continues"))


def test_waits_for_commands_locks_and_blocking_clients_can_be_interrupted(
    make_corpus: Any, told: None, tmp_path: Path
) -> None:
    directory, config = make_corpus(LENGTHS), StorageConfig(allow_pipe=True, cache_dir=tmp_path / "cache")
    cached = Corpus.open(f"pipe:cat {directory}/{{}}", "train", config)
    copy = cached.storage._copy_name(TAR)
    with (tmp_path / "cache" / f"{copy}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Stopped, match="another process"):
            cached.document(0)
    mark = tmp_path / "pid"
    with pytest.raises(Stopped, match="reading was interrupted"):
        Corpus.open(f"pipe:sleep 1000 & echo $! > {mark}; wait; cat {{}}", "train", config)
    ended = Path(f"/proc/{int(mark.read_text())}/stat")
    while ended.exists() and ended.read_text().rpartition(")")[2].split()[0] not in "ZX":
        time.sleep(0.01)  # the command's children end with it

    class Blocking(MemoryFileSystem):
        protocol, cachable = "blocking", False

        def cat_file(self, *_: Any, **__: Any) -> bytes:
            threading.Event().wait()

    fsspec.register_implementation("blocking", Blocking, clobber=True)
    with pytest.raises(Stopped, match="reading was interrupted"):
        Corpus.open("blocking://books", "train", StorageConfig())
    STOP_REQUESTED.clear()
    with pytest.raises(StorageError, match=r"storage\.deadline_s"):
        Corpus.open("blocking://books", "train", StorageConfig(attempts=1, deadline_s=0.3))


def test_pipe_command_without_output_times_out(tmp_path: Path) -> None:
    config = StorageConfig(allow_pipe=True, cache_dir=tmp_path, timeout_s=0.3)
    with pytest.raises(StorageError, match=r"wrote nothing for 0\.3 s"):
        Corpus.open("pipe:sleep 1000; cat {}", "train", config)


def test_missing_credentials_are_not_retried(make_corpus: Any, serve: Any, monkeypatch) -> None:
    corpus = Corpus.open(serve(make_corpus(LENGTHS)).url, "train", StorageConfig(attempts=6, backoff_s=1000))
    asked = []

    def refuse(*_: Any, **__: Any) -> bytes:
        asked.append(1)
        raise botocore.exceptions.NoCredentialsError

    monkeypatch.setattr(corpus.storage, "_cat", refuse)
    with pytest.raises(StoreConfigError, match=r"NoCredentialsError.*give them as the store's client expects"):
        corpus.document(0)
    assert len(asked) == 1


def test_secrets_are_refused_in_plain_text_and_read_from_the_environment(monkeypatch) -> None:
    for options in ({"secret": "x"}, {"key": "x"}, {"client_kwargs": {"aws_access_key_id": "x"}}, {"token": "x"}):
        with pytest.raises(ConfigError, match=r"would be written into the run directory; .* write \$NAME"):
            parse(StorageConfig, {"options": options})
    config = parse(StorageConfig, {"options": {"key": "$SOME_KEY", "token": "anon", "profile": "x"}})
    with pytest.raises(StoreConfigError, match=r"options\.key: the environment variable SOME_KEY is not set"):
        remote._options("gs", config)
    monkeypatch.setenv("SOME_KEY", "hidden")
    assert remote._options("gs", config) == {"key": "hidden", "token": "anon", "profile": "x"}
    assert "hidden" not in dump(config)


def test_secrets_in_urls_come_from_the_environment_and_are_never_shown(
    make_corpus: Any, serve: Any, monkeypatch, caplog
) -> None:
    for url in (
        "https://me:hidden@host/books",
        "https://host/books?sv=1&sig=hidden",
        "s3://b/c?X-Amz-Signature=hidden",
    ):
        for settings in ({"corpus": url}, {"corpus": [{"corpus": url}]}):
            with pytest.raises(ConfigError, match=r"would be written into the run directory; put it into") as refused:
                parse(DataConfig, settings)
            assert "hidden" not in str(refused.value)
    server = serve(directory := make_corpus(LENGTHS))
    url = server.url.replace("//", "//me:$PASSWORD@") + "/?sv=1&sig=$SIG"
    config = parse(DataConfig, {"corpus": url, "storage": FAST | {"attempts": 2}})
    with pytest.raises(UserError, match="the environment variable SIG is not set"):
        open_corpora(config)
    monkeypatch.setenv("SIG", "hid%2Fden")
    with pytest.raises(UserError, match=r"&sig=\$SIG: the environment variable PASSWORD is not set"):
        open_corpora(config)
    monkeypatch.setenv("PASSWORD", "hid/den")
    (corpus,) = open_corpora(config)
    assert_same_documents(corpus, directory)
    assert set(server.signed) == {("sv=1&sig=hid/den", "Basic " + base64.b64encode(b"me:hid/den").decode())}
    server.faults[TAR] = ["503"] * 9
    with pytest.raises(StorageError, match=rf"{TAR}: not read in 2 attempts.* 503") as failed:
        corpus.document(0)
    said = "".join(traceback.format_exception(failed.value)) + caplog.text + dump(config) + corpus.where
    assert "trying again" in said and "hid/den" not in said and "hid%2Fden" not in said


def test_missing_corpus_or_server_gives_one_clear_message(tmp_path: Path, serve: Any) -> None:
    with pytest.raises(UserError, match="no prepared corpus there"):
        Corpus.open(serve(tmp_path).url, "train", StorageConfig(**FAST))
    with pytest.raises(StorageError, match=r"manifest\.json: not read in 4 attempts"):
        Corpus.open("http://127.0.0.1:9", "train", StorageConfig(**FAST))
    with pytest.raises(StoreConfigError, match="nosuch://x: cannot be opened"):
        Corpus.open("nosuch://x")


def test_local_index_that_the_disk_cannot_read_is_a_named_error(
    make_corpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system names no file in errors of an open one; without a name, it would look like a bug of the program."""
    corpus = Corpus.open(str(make_corpus(LENGTHS)))

    def fail(self: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OSError, match="Input/output error") as failed:
        corpus.document(0)
    assert Path(failed.value.filename).name == "train-000000.idx"


def test_cache_fetches_only_used_files_and_only_once(make_corpus: Any, serve: Any, tmp_path: Path) -> None:
    server = serve(make_corpus(LENGTHS))
    config = StorageConfig(**FAST, cache_dir=tmp_path / "cache")
    for _ in range(2):
        corpus = Corpus.open(server.url, "train", config)
        corpus.document(0), corpus.document(1)
    fetched = [name for name, _ in server.requests if name != "manifest.json"]
    assert fetched.count(TAR) == 1
    assert "train-000001.tar" not in fetched
    assert not list((tmp_path / "cache").glob("*.partial"))


@pytest.mark.parametrize("fault", ["flip", "drop"])
def test_cache_keeps_no_damaged_or_incomplete_file(make_corpus: Any, serve: Any, tmp_path: Path, fault: str) -> None:
    server = serve(make_corpus(LENGTHS))
    config = StorageConfig(**FAST, cache_dir=tmp_path / "cache")
    corpus = Corpus.open(server.url, "train", config)
    server.faults[TAR] = [fault] * 4
    with pytest.raises(UserError, match=TAR):
        corpus.document(0)
    assert not list((tmp_path / "cache").glob("*train-000000.tar"))
    server.faults.clear()
    assert len(corpus.document(0)) == LENGTHS[0]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "remove before it is opened"])
def test_damaged_cached_copy_is_fetched_again(make_corpus: Any, serve: Any, tmp_path: Path, damage: str) -> None:
    directory = make_corpus(LENGTHS)
    config = StorageConfig(**FAST, cache_dir=tmp_path / "cache")
    server = serve(directory)
    corpus = Corpus.open(server.url, "train", config)
    corpus.document(0)
    (copy,) = (tmp_path / "cache").glob(f"*{TAR}")
    if damage.startswith("remove"):
        for file in (tmp_path / "cache").glob("*[rdx]"):  # as a cleanup job may do at any time
            file.unlink()
        if damage != "remove":
            corpus.storage._local.forget()
        assert_same_documents(corpus, directory)
    elif damage == "flip":
        data = bytearray(copy.read_bytes())
        data[5000] ^= 1
        copy.write_bytes(data)
    else:
        os.truncate(copy, 3000)
    assert_same_documents(Corpus.open(server.url, "train", config), directory)


def test_concurrent_threads_fetch_a_file_only_once(make_corpus: Any, serve: Any, tmp_path: Path) -> None:
    server = serve(make_corpus(LENGTHS))
    config = StorageConfig(**FAST, cache_dir=tmp_path / "cache")
    corpora = [Corpus.open(server.url, "train", config) for _ in range(4)]
    threads = [threading.Thread(target=corpus.document, args=(0,)) for corpus in corpora]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [name for name, _ in server.requests].count(TAR) == 1


def test_full_disk_while_caching_is_reported_and_leaves_no_file(
    make_corpus: Any, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev/full replaces the unfinished copy, so that writing fails as on a full disk."""
    server = serve(make_corpus(LENGTHS))
    config = StorageConfig(**FAST, cache_dir=tmp_path / "cache")
    corpus = Corpus.open(server.url, "train", config)
    real_open = Path.open

    def full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return real_open(Path("/dev/full") if self.name.endswith(".partial") else self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match="the disk is full"):
        corpus.document(0)
    assert not list((tmp_path / "cache").glob("*train-000000.tar"))


def cached_bytes(cache: Path) -> int:
    return sum(file.stat().st_size for file in cache.iterdir() if not file.name.endswith(".lock"))


def test_limited_cache_removes_the_least_recently_used_files(make_corpus: Any, serve: Any, tmp_path: Path) -> None:
    directory = make_corpus([5000] * 12, shards=12)
    server, cache = serve(directory), tmp_path / "cache"
    shard = (directory / TAR).stat().st_size
    config = StorageConfig(**FAST, cache_dir=cache, cache_bytes=6 * shard)
    corpus = Corpus.open(server.url, "train", config)
    for number in range(5):
        corpus.document(number)
    os.utime(next(cache.glob(f"*{TAR}")))  # as a reading process does
    open_file = next(cache.glob("*train-000001.tar")).open("rb")
    for number in range(5, 12):
        corpus.document(number)
        assert cached_bytes(cache) <= 6 * shard
    assert list(cache.glob("*-000011.tar")) and not list(cache.glob("*-000001.tar")) + list(
        cache.glob("*-000001*.lock")
    )
    assert len(open_file.read()) == shard  # a process that has it open can still read it
    open_file.close()
    assert_same_documents(corpus, directory)  # what was dropped is fetched again


def test_recently_used_copy_stays_in_the_cache(make_corpus: Any, serve: Any, tmp_path: Path) -> None:
    directory = make_corpus([5000] * 4, shards=4)
    cache, shard = tmp_path / "cache", (directory / TAR).stat().st_size
    config = StorageConfig(**FAST, cache_dir=cache, cache_bytes=int(3.7 * shard))
    server = serve(directory)
    for number in (0, 1, 0, 2, 3):  # one process each
        Corpus.open(server.url, "train", config).document(number)
    assert [name for name, _ in server.requests].count(TAR) == 1
    assert not list(cache.glob("*-000001.tar"))


def test_failed_fetch_releases_its_reserved_cache_space(make_corpus: Any, serve: Any, tmp_path: Path) -> None:
    directory = make_corpus([5000] * 4, shards=4)
    server, cache = serve(directory), tmp_path / "cache"
    corpus = Corpus.open(server.url, "train", StorageConfig(**FAST, cache_dir=cache, cache_bytes=10**6))
    server.faults[TAR] = ["drop"] * 99
    for _ in range(3):
        with pytest.raises(UserError):
            corpus.document(0)
    corpus.document(1)
    assert int((cache / ".taken").read_text()) == cached_bytes(cache) - (cache / ".taken").stat().st_size


def wait_for(cache: Path, count: int) -> None:
    """Wait until `count` shards were fetched in the background."""
    for _ in range(400):
        if len(list(cache.glob("*.tar"))) == count:
            return
        threading.Event().wait(0.05)
    raise AssertionError(f"{len(list(cache.glob('*.tar')))} shards, not {count}")


def test_windows_are_prefetched_and_too_small_cache_limit_is_refused(
    make_corpus: Any, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "WINDOW_TOKENS", 30_000)  # six shards
    monkeypatch.setattr(rows, "_TOGETHER", 64)
    directory = make_corpus([5000] * 24, shards=24)
    server, cache = serve(directory), tmp_path / "cache"
    config = DataConfig(corpus=server.url, prefetch=0, storage=StorageConfig(**FAST, cache_dir=cache))
    share = Share(length=64, rows=1, micro_rows=1)  # of which 64 are located together
    corpora = open_corpora(config)
    Loader(config, corpora, share, block=64, seed=1).batches(0)
    wait_for(cache, 12)
    names = [name for name, _ in server.requests if name.endswith(".tar")]
    assert len(names) == len(set(names)) == 12  # of this window and the next; most were not needed yet
    for copy in cache.glob("*.tar"):
        copy.unlink()
    corpora[0].fetch_ahead(range(24), [])
    wait_for(cache, 24)
    small = config.storage.model_copy(update={"cache_bytes": 50_000})
    config = config.model_copy(update={"storage": small})
    loader = Loader(config, open_corpora(config), share, block=64, seed=1)
    with pytest.raises(UserError, match=r"storage\.cache_bytes: 50,000 bytes hold no window of http.* which has \d"):
        loader.batches(0)


def test_a_limit_without_a_cache_is_refused() -> None:
    with pytest.raises(ConfigError, match="cache_bytes limits the copies in cache_dir"):
        parse(StorageConfig, {"cache_bytes": 10**9})


def test_pipe_addresses_are_refused_unless_allowed(make_corpus: Any, tmp_path: Path) -> None:
    directory = make_corpus(LENGTHS)
    mark = tmp_path / "ran"
    url = f"pipe:touch {mark}; cat {directory}/{{}}"
    with pytest.raises(StoreConfigError, match=r"storage\.allow_pipe"):
        Corpus.open(url)
    with pytest.raises(StoreConfigError, match=r"storage\.cache_dir"):
        Corpus.open(url, "train", StorageConfig(allow_pipe=True))
    assert not mark.exists()
    config = StorageConfig(allow_pipe=True, cache_dir=tmp_path / "cache")
    assert_same_documents(Corpus.open(url, "train", config), directory)
    with pytest.raises(StorageError, match="exit status 3"):
        Corpus.open("pipe:exit 3; {}", "train", config)


def test_manifest_with_file_names_outside_the_corpus_is_refused(make_corpus: Any) -> None:
    directory = make_corpus(LENGTHS)
    manifest = directory / "manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"{TAR}"', '"../../etc/passwd"'))
    with pytest.raises(UserError, match="not a plain file name"):
        Corpus.open(str(directory))


def test_corpus_is_read_from_an_fsspec_memory_store(make_corpus: Any) -> None:
    directory = make_corpus(LENGTHS)
    memory = fsspec.filesystem("memory")
    memory.put(str(directory), "/books", recursive=True)
    try:
        assert_same_documents(Corpus.open("memory://books", "train", StorageConfig(**FAST)), directory)
    finally:
        memory.rm("/books", recursive=True)


def test_corpus_is_read_from_s3(make_corpus: Any, s3_endpoint: Callable[[], dict[str, Any]], monkeypatch) -> None:
    directory = make_corpus(LENGTHS)
    options = s3_endpoint()
    store = fsspec.filesystem("s3", **options)
    store.mkdir("bucket")
    store.put(str(directory), "bucket/books", recursive=True)
    monkeypatch.setenv("STORE_SECRET", options["secret"])
    monkeypatch.setenv("STORE_KEY", options["key"])
    options |= {"secret": "$STORE_SECRET", "key": "$STORE_KEY"}
    config = StorageConfig(**FAST | {"timeout_s": 10}, options=options)
    assert_same_documents(Corpus.open("s3://bucket/books", "train", config), directory)
    with pytest.raises(UserError, match="no prepared corpus there"):
        Corpus.open("s3://bucket/none", "train", config)


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_client_options_allow_the_number_of_concurrent_requests(scheme: str) -> None:
    options = remote._options(scheme, StorageConfig())
    if scheme == "s3":
        assert options["config_kwargs"]["max_pool_connections"] == REQUESTS
        return

    async def limit() -> int:
        async with await options["get_client"](**options["client_kwargs"]) as client:
            return client.connector.limit

    assert asyncio.run(limit()) == 0


def test_loader_keeps_enough_reads_in_flight(make_corpus: Any) -> None:
    """No read returns before 74 are in flight: 500,000 tokens/s need that many at 40 ms and 272 tokens per read."""
    directory = make_corpus([20] * 4000)
    under_way, enough = itertools.count(1), threading.Event()

    class Slow(LocalStorage):
        remote = True

        def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
            if next(under_way) >= 74:
                enough.set()
            assert enough.wait(30), "too few reads at a time"
            super().read_into(name, offset, buffer)

    corpus = Corpus(Slow(directory), Manifest.read(directory), "train")
    config = DataConfig(corpus=str(directory))
    loader = Loader(config, [corpus], Share(length=512, rows=4, micro_rows=4), block=64, seed=1)
    local = Loader(config, open_corpora(config), Share(length=512, rows=4, micro_rows=4), block=64, seed=1)
    for (step, found), (_, expected) in islice(zip(loader, local, strict=True), 3):
        assert np.array_equal(found[0].input_ids, expected[0].input_ids), step
    loader.close()
    local.close()


def test_a_misspelt_key_of_the_storage_settings_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cache_dir'"):
        parse(StorageConfig, {"cachedir": "x"})


def test_loader_over_http_equals_loader_over_a_directory(make_corpus: Any, serve: Any) -> None:
    directory = make_corpus(LENGTHS)
    server = serve(directory)
    server.faults[TAR] = ["503", "drop"]
    served = []
    for url in (str(directory), server.url):
        config = DataConfig(corpus=url, storage=StorageConfig(**FAST))
        loader = Loader(config, open_corpora(config), Share(length=512, rows=4, micro_rows=4), block=64, seed=1)
        served.append([batches[0].input_ids for _, batches in islice(loader, 5)])
        loader.close()
    assert np.array_equal(*served)
    assert sum(name.endswith(".idx") for name, _ in server.requests) == 2  # each index once
