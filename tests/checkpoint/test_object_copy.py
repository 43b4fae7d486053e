"""`bst ckpt push` and `bst ckpt pull` as a user runs them: copy a run to an object store and back."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import fsspec
import pytest
import s3fs
from fsspec.implementations.local import LocalFileSystem

from bst_base.errors import StorageError, UserError
from bst_dist.checkpoint.directory import MANIFEST, damage, directory, manifest_content, read_manifest
from bst_dist.checkpoint.object_copy import RunCopy
from bst_dist.cli import main
from tests.checkpoint.damage import flip
from tests.checkpoint.pushing import contents, earlier, only_weights, pull, push

STEP = "checkpoints/step-00000004"


@pytest.fixture
def url(tmp_path) -> str:
    return f"file://{tmp_path}/store/demo"


def test_push_and_pull_restore_a_run_byte_for_byte(older, url, tmp_path):
    assert push(older, url) == 0
    assert pull(url, tmp_path / "back") == 0
    there = contents(older)
    assert contents(tmp_path / "back") == {name: data for name, data in there.items() if "heartbeats" not in name}


@pytest.mark.ranks
def test_a_pulled_run_can_be_resumed(bst, older, url, tmp_path):
    assert push(older, url) == 0
    shutil.rmtree(older)
    assert pull(url, older) == 0
    done = bst("train", "run/recipe.yaml", "--resume", "--ranks", 2, "--run-dir", "run")
    assert done.returncode == 0, done.stdout
    assert "resumed from step 4" in done.stdout


def test_push_and_pull_work_with_s3(older, s3_endpoint, tmp_path, monkeypatch):
    server = s3_endpoint()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server["endpoint_url"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", server["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server["secret"])
    monkeypatch.setenv("AWS_DEFAULT_REGION", server["client_kwargs"]["region_name"])
    s3fs.S3FileSystem(**server).mkdir("runs")
    assert push(older, "s3://runs/demo") == 0
    assert RunCopy("s3://runs/demo").steps() == [4]
    assert pull("s3://runs/demo", tmp_path / "back") == 0
    assert contents(directory(tmp_path / "back", 4)) == contents(directory(older, 4))


def test_an_interrupted_push_leaves_no_checkpoint_and_can_be_repeated(older, url, tmp_path, monkeypatch, capsys):
    put, sent = RunCopy._put, []

    def fails(self, path, name):
        sent.append(name)
        if len(sent) == 3:
            raise StorageError("the network is gone")
        return put(self, path, name)

    monkeypatch.setattr(RunCopy, "_put", fails)
    with pytest.raises(StorageError):
        RunCopy(url).put_checkpoint(directory(older, 4))
    monkeypatch.undo()
    assert RunCopy(url).steps() == []
    assert pull(url, tmp_path / "back") == 2
    assert "no complete checkpoint; there are: none" in capsys.readouterr().err
    assert push(older, url) == 0
    assert pull(url, tmp_path / "back") == 0


def test_the_manifest_is_sent_after_all_other_files(older, url, monkeypatch):
    sent, put = [], RunCopy._put
    monkeypatch.setattr(RunCopy, "_put", lambda self, path, name: (put(self, path, name), sent.append(name))[0])
    RunCopy(url).put_checkpoint(directory(older, 4))
    assert sent[-1] == f"{STEP}/manifest.json" and len(sent) == 1 + len(manifest_of(older)["files"])


def manifest_of(run: Path) -> dict:
    return json.loads((directory(run, 4) / "manifest.json").read_text())


def test_damaged_checkpoints_are_neither_pushed_nor_pulled(older, url, tmp_path, capsys):
    assert push(older, url) == 0
    weights = tmp_path / "store" / "demo" / STEP / "weights-00001.safetensors"
    flip(weights)
    assert pull(url, tmp_path / "back") == 2
    assert "checksum mismatch in rank 1's file weights-00001.safetensors" in capsys.readouterr().err
    assert not directory(tmp_path / "back", 4).exists()
    flip(directory(older, 4) / "weights-00000.safetensors")
    assert push(older, f"{url}-2") == 2
    assert "checksum mismatch in rank 0's file weights-00000.safetensors" in capsys.readouterr().err
    assert RunCopy(f"{url}-2").steps() == []


def test_a_changed_digit_in_a_copied_manifest_is_noticed(older, url, tmp_path, capsys):
    own = directory(older, 4)
    (own / MANIFEST).write_bytes(manifest_content(read_manifest(own)))  # as this version writes it
    assert push(older, url) == 0
    there = tmp_path / "store" / "demo" / STEP / MANIFEST
    there.write_text(there.read_text().replace('"updates": 4', '"updates": 5'))
    assert pull(url, tmp_path / "back") == 2
    assert "manifest.json: damaged (checksum mismatch): push this checkpoint again" in capsys.readouterr().err
    assert push(older, url) == 0
    assert pull(url, tmp_path / "back") == 0
    assert damage(directory(tmp_path / "back", 4)) == []


def test_the_copy_keeps_only_newest_and_pinned_checkpoints(older, url, capsys):
    for step in (1, 2, 3):
        earlier(older, step)
        if step == 1:
            assert main(["ckpt", "pin", str(older), "--step", "1"]) == 0
        assert push(older, url, "--step", str(step)) == 0
    assert push(older, url) == 0
    assert RunCopy(url).steps() == [4, 3, 1]
    assert "checkpoint 2 removed" in capsys.readouterr().out


def test_a_second_push_sends_nothing_and_says_so(older, url, capsys):
    assert push(older, url) == 0
    assert "already there" not in capsys.readouterr().out
    assert push(older, url) == 0
    said = capsys.readouterr().out
    assert "already there" in said and "sent to" not in said


def test_the_newest_full_checkpoint_is_sent_and_fetched_beside_newer_weights(older, url, tmp_path, capsys):
    only_weights(older, 5)
    only_weights(older, 3)
    assert push(older, url) == 0
    assert RunCopy(url).steps() == [5, 4]
    assert pull(url, tmp_path / "back") == 0
    assert directory(tmp_path / "back", 4).is_dir() and not directory(tmp_path / "back", 5).exists()
    assert "checkpoint 5 is newer, but has only weights" in capsys.readouterr().out
    assert pull(url, tmp_path / "back", "--step", "5") == 0
    assert directory(tmp_path / "back", 5).is_dir()


def test_weights_are_pushed_and_pulled_if_there_is_no_full_checkpoint(older, url, tmp_path):
    only_weights(older, 5)
    shutil.rmtree(directory(older, 4))
    assert push(older, url) == 0
    assert pull(url, tmp_path / "back") == 0
    assert directory(tmp_path / "back", 5).is_dir()


def test_pull_refuses_the_directory_of_another_run(older, url, tmp_path, capsys):
    assert push(older, url) == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "recipe.yaml").write_text("name: other\n")
    assert pull(url, tmp_path / "other") == 2
    assert "another recipe" in capsys.readouterr().err


def test_an_interrupted_pull_is_repeated_with_all_files(older, url, tmp_path, monkeypatch):
    (older / "tokenizer.model").write_bytes(b"pieces")
    assert push(older, url) == 0
    read = LocalFileSystem.cat_file

    def fails(self, path, *args, **kwargs):
        if path.endswith("tokenizer.model"):
            raise OSError("the network is gone")
        return read(self, path, *args, **kwargs)

    monkeypatch.setattr(LocalFileSystem, "cat_file", fails)
    assert pull(url, tmp_path / "back") == 74
    monkeypatch.undo()
    assert pull(url, tmp_path / "back") == 0
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == b"pieces"


class Vault(LocalFileSystem):
    """A directory behind a password, whose client puts the password into its messages."""

    protocol, cachable = "vault", False

    def __init__(self, password: str, **_: object) -> None:
        super().__init__(auto_mkdir=True)
        self.password = password

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.partition("@host")[2] or path)

    @staticmethod
    def _get_kwargs_from_urls(url: str) -> dict[str, str]:
        return {"password": url.partition("me:")[2].partition("@")[0]}

    def glob(self, path: str, **options: object) -> dict[str, object]:
        if self.password != "hunter2":
            raise PermissionError(f"me:{self.password} was refused")
        return super().glob(path, **options)


def test_a_password_in_the_address_is_filled_in_and_never_shown(older, tmp_path, monkeypatch, capsys):
    fsspec.register_implementation("vault", Vault, clobber=True)
    report, place = tmp_path / "report.json", f"host{tmp_path}/store"
    monkeypatch.setenv("VAULT_PASSWORD", "hunter2")
    for run, password in (("a", "$VAULT_PASSWORD"), ("b", "hunter2")):
        url = f"vault://me:{password}@{place}/{run}"
        assert push(older, url, "--json", str(report)) == 0
        assert pull(url, tmp_path / "back" / run) == 0
        shutil.copytree(older, other := tmp_path / "other" / run)
        (other / "environment.json").unlink()
        (other / "recipe.yaml").write_text((older / "recipe.yaml").read_text() + "# another\n")
        assert pull(url, other) == 2
    monkeypatch.setenv("VAULT_PASSWORD", "hunter3")
    for password in ("$VAULT_PASSWORD", "hunter3"):
        assert push(older, f"vault://me:{password}@{place}/c") == 74
    said, failed = capsys.readouterr()
    assert f"vault://me:$VAULT_PASSWORD@{place}/a" in said and f"vault://me:…@{place}/b" in said
    assert "me:$VAULT_PASSWORD was refused" in failed and "me:… was refused" in failed
    assert "hunter" not in said + failed + report.read_text()


@pytest.mark.parametrize("arguments", [["--watch", "--step", "4"], ["--keep", "0"]])
def test_invalid_push_options_are_refused(older, url, arguments, capsys):
    assert push(older, url, *arguments) == 2
    assert capsys.readouterr().err


def test_a_local_path_is_refused_as_address(older, tmp_path):
    with pytest.raises(UserError, match="not an address"):
        RunCopy(str(tmp_path))


def test_storage_errors_name_the_file(older, tmp_path, capsys):
    (tmp_path / "store").write_text("in the way")
    assert push(older, f"file://{tmp_path}/store/demo") == 74
    assert "store/demo" in capsys.readouterr().err


def test_pull_fetches_the_complete_checkpoint_of_a_step(older, url, tmp_path):
    push(older, url)
    assert pull(url, tmp_path / "back", "--step", "4") == 0
    assert damage(directory(tmp_path / "back", 4)) == []
    assert pull(url, tmp_path / "back", "--step", "9") == 2


class Sftp(LocalFileSystem):
    """A directory whose client creates missing directories as fsspec's for SFTP does: not safely in many threads."""

    protocol, cachable = "slow", False

    def put_file(self, lpath: str, rpath: str, **_: object) -> None:
        folder = Path(self._strip_protocol(rpath)).parent
        if not folder.exists():
            time.sleep(0.1)
            folder.mkdir(parents=True)  # OSError if another thread has created it meanwhile
        shutil.copy(lpath, self._strip_protocol(rpath))


def test_the_directory_of_a_checkpoint_is_created_by_one_thread(older, tmp_path):
    fsspec.register_implementation("slow", Sftp, clobber=True)
    assert push(older, f"slow://{tmp_path}/store/demo") == 0
    assert contents(directory(tmp_path / "store" / "demo", 4)) == contents(directory(older, 4))


def test_parts_that_interrupted_pushes_have_left_are_removed(older, url, tmp_path, capsys):
    store = tmp_path / "store" / "demo"
    for step in (2, 3):
        (directory(store, step)).mkdir(parents=True)
        (directory(store, step) / "weights-00000.safetensors").write_bytes(b"a part")
    earlier(older, 3)  # the run still has it, so another push may be sending it
    assert push(older, url) == 0
    assert sorted(path.name for path in (store / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]
    assert "checkpoint 2 removed" in capsys.readouterr().out
    shutil.rmtree(directory(older, 3))
    assert push(older, url) == 0
    assert sorted(path.name for path in (store / "checkpoints").iterdir()) == ["step-00000004"]


def test_an_older_checkpoint_is_used_if_the_manifest_of_the_newest_is_cut_off(older, url, tmp_path, capsys):
    for step in (2, 3):
        earlier(older, step)
        assert push(older, url, "--step", str(step)) == 0
    cut = directory(tmp_path / "store" / "demo", 3) / MANIFEST
    cut.write_bytes(cut.read_bytes()[:50])
    assert pull(url, tmp_path / "back") == 0
    assert directory(tmp_path / "back", 2).is_dir()
    said = capsys.readouterr().out
    assert f"{STEP[:-1]}3/manifest.json: not JSON" in said and "the newest whole checkpoint is taken" in said
    assert pull(url, tmp_path / "third", "--step", "3") == 2
    capsys.readouterr()
    assert push(older, url) == 0  # and a push is not stopped by it
    assert RunCopy(url).has(4, manifest_of(older))
