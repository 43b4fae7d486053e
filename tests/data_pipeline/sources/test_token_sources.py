"""Token ids of Megatron-LM, nanoGPT, llm.c and NumPy, written here byte by byte in their published formats."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from bst_base.errors import UserError
from bst_base.settings import ConfigError, parse
from data_pipeline.format.tokenizer import IdsOnly
from data_pipeline.sources import SOURCES, megatron, nanogpt

IDS = {"vocab_size": 100, "eos_id": 99}


def write_megatron(prefix: Path, documents: Sequence[Sequence[Sequence[int]]], code: int = 8, dtype="<u2") -> None:
    """Write documents, each a list of sequences of ids, as Megatron-LM files."""
    sequences = [sequence for document in documents for sequence in document]
    bounds = np.cumsum([0, *map(len, documents)])
    prefix.parent.mkdir(parents=True, exist_ok=True)
    prefix.with_suffix(".bin").write_bytes(b"".join(np.array(s, dtype).tobytes() for s in sequences))
    begins = np.cumsum([0, *(len(s) * np.dtype(dtype).itemsize for s in sequences)])[:-1]
    prefix.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(sequences), len(bounds))
        + struct.pack(f"<{len(sequences)}i", *map(len, sequences))
        + struct.pack(f"<{len(sequences)}q", *begins)
        + struct.pack(f"<{len(bounds)}q", *bounds)
    )


def ids_of(documents: list) -> dict[str, list[int]]:
    return {document.path: document.content.tolist() for document in documents}


@pytest.mark.parametrize(("code", "dtype"), [(8, "<u2"), (4, "<i4"), (5, "<i8"), (1, "u1")])
def test_megatron_documents_are_read(read_all, tmp_path: Path, code: int, dtype: str) -> None:
    write_megatron(tmp_path / "a/x", [[[1, 2, 3, 99]], [[4], [5, 6]], [[]], [[99]], [[7, 99, 8, 99]]], code, dtype)
    write_megatron(tmp_path / "b", [[[9, 9]]], code, dtype)
    (tmp_path / "orphan.bin").write_bytes(b"12")
    documents, skipped = read_all("megatron", path=tmp_path, **IDS)
    assert ids_of(documents) == {"a/x:0": [1, 2, 3], "a/x:1": [4, 5, 6], "a/x:4": [7, 99, 8], "b:0": [9, 9]}
    assert skipped == {"a/x:2": "empty", "a/x:3": "empty", "*.bin": "ending .bin"}
    assert ids_of(read_all("megatron", path=tmp_path / "b.idx", **IDS)[0]) == {"b:0": [9, 9]}


def test_splitting_large_id_files_does_not_change_the_documents(read_all, tmp_path: Path, monkeypatch) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 99, rng.integers(1, 60)).tolist() for _ in range(200)]
    write_megatron(tmp_path / "m/x", [[each] for each in documents])
    flat = np.concatenate([[99, *each] for each in documents]).astype("<u2")
    (tmp_path / "x.bin").write_bytes(flat.tobytes())
    for module, size in [(megatron, 500), (nanogpt, 500), (nanogpt, 2)]:
        monkeypatch.setattr(module, "RANGE", size)
        kind, path = ("megatron", tmp_path / "m") if module is megatron else ("nanogpt", tmp_path / "x.bin")
        found = read_all(kind, path=path, **IDS)[0]
        assert [each.content.tolist() for each in found] == documents
        assert len({each.path for each in found}) == 200
    monkeypatch.setattr(nanogpt, "_AT_ONCE", 7)
    assert [each.content.tolist() for each in read_all("nanogpt", path=tmp_path / "x.bin", **IDS)[0]] == documents


def test_flat_id_files_are_read_with_and_without_a_header(read_all, tmp_path: Path) -> None:
    def llm_c(magic: int, version: int, dtype: str, ids: list[int]) -> bytes:
        header = np.zeros(256, "<i4")
        header[:3] = magic, version, len(ids)
        return header.tobytes() + np.array(ids, dtype).tobytes()

    (tmp_path / "train.bin").write_bytes(np.array([1, 2, 99, 3, 99], "<u2").tobytes())  # end token after each
    (tmp_path / "fineweb_train_000001.bin").write_bytes(llm_c(20240520, 1, "<u2", [99, 4, 5, 99, 6]))  # before each
    (tmp_path / "fineweb_val_000000.bin").write_bytes(llm_c(20240801, 7, "<u4", [99, 7, 99]))
    np.save(tmp_path / "test_0.npy", np.array([99, 8, 9], np.int64))
    found = read_all("nanogpt", path=tmp_path, own_splits=True, **IDS)[0]
    assert [(each.path, each.content.tolist(), each.split) for each in found] == [
        ("fineweb_train_000001.bin:1", [4, 5], "train"),
        ("fineweb_train_000001.bin:4", [6], "train"),
        ("fineweb_val_000000.bin:1", [7], "validation"),
        ("test_0.npy:1", [8, 9], "test"),
        ("train.bin:0", [1, 2], "train"),
        ("train.bin:3", [3], "train"),
    ]
    (tmp_path / "olmo.npy").write_bytes(np.array([70000, 99, 3], "<u4").tobytes())
    found = read_all("nanogpt", path=tmp_path / "olmo.npy", dtype="uint32", vocab_size=70001, eos_id=99)[0]
    assert ids_of(found) == {"olmo.npy:0": [70000], "olmo.npy:2": [3]}


def test_damaged_id_files_are_refused_by_name(read_all, tmp_path: Path) -> None:
    write_megatron(tmp_path / "x", [[[1, 2, 3]], [[4]]])
    idx, binary = (tmp_path / "x.idx").read_bytes(), (tmp_path / "x.bin").read_bytes()
    for name, data, message in [
        ("x.bin", binary[:-2], r"x\.bin: 6 bytes, its index says 8: cut short or of another data set"),
        ("x.idx", idx[:-8], r"x\.idx: 74 bytes, expected 82: cut short"),
        ("x.idx", b"TNTIDX" + bytes(40), "not an index of Megatron's"),
        ("x.idx", idx[:17] + b"\x06" + idx[18:], "version 1, type 6: not the token ids"),
        ("x.idx", idx[:-8] + struct.pack("<q", 1), "its documents are not made of its sequences"),
        ("x.idx", idx[:42] + struct.pack("<q", 8) + idx[50:], "do not lie one after the other"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=message):
            read_all("megatron", path=tmp_path, **IDS)
        (tmp_path / "x.idx").write_bytes(idx)
        (tmp_path / "x.bin").write_bytes(binary)
    with pytest.raises(UserError, match=r"x:1: an id outside the vocabulary \(4, of 4 ids\); give .*vocab_size"):
        read_all("megatron", path=tmp_path, vocab_size=4, eos_id=0)
    (tmp_path / "y.bin").write_bytes(struct.pack("<3i", 20240520, 1, 9) + bytes(1012) + bytes(8))
    with pytest.raises(UserError, match=r"y\.bin: version 1 with 9 ids in its header, 4 in the file"):
        read_all("nanogpt", path=tmp_path / "y.bin", **IDS)
    (tmp_path / "z.bin").write_bytes(b"123")
    with pytest.raises(UserError, match=r"z\.bin: 3 bytes are not a whole number of uint16 ids; set source\.dtype"):
        read_all("nanogpt", path=tmp_path / "z.bin", **IDS)


def test_id_reader_stays_within_its_range(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(np.arange(10, dtype="<u2").tobytes())
    ids = nanogpt._Ids(tmp_path / "x.bin", np.dtype("<u2"), 4, 7)  # of the ten, 2 to 8
    assert [ids.read(place, 3).tolist() for place in (0, 5, 7)] == [[2, 3, 4], [7, 8], []]


def test_document_of_many_parts_is_read_twice_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nanogpt, "RANGE", 2000)
    monkeypatch.setattr(nanogpt, "_AT_ONCE", 100)
    ids = np.ones(40_000, "<u2")
    ids[[70, 39_000, 39_999]] = 99
    (tmp_path / "x.bin").write_bytes(ids.tobytes())
    read, counted = nanogpt._Ids.read, []
    monkeypatch.setattr(nanogpt._Ids, "read", lambda *given: counted.append(len(found := read(*given))) or found)
    source = SOURCES["nanogpt"](path=tmp_path / "x.bin", **IDS)
    parts = source.listing().parts
    documents = [document for part in parts for document in source.read(part)]
    assert len(parts) == 40 and sum(counted) < 2.2 * len(ids)
    assert [(each.path, len(each.content)) for each in documents] == [
        ("x.bin:0", 70),
        ("x.bin:71", 38_929),
        ("x.bin:39001", 998),
    ]


@pytest.mark.parametrize(("size", "end"), [(50_256, 50_256), (50_000, 70_000)])
def test_end_id_outside_the_vocabulary_is_refused(tmp_path: Path, size: int, end: int) -> None:
    with pytest.raises(ConfigError, match=f"eos_id: {end} is not below vocab_size.*at least {end + 1}"):
        parse(SOURCES["nanogpt"], {"path": str(tmp_path / "x.bin"), "vocab_size": size, "eos_id": end})
    with pytest.raises(UserError, match=f"eos_id {end} is not one of its {size} ids.*prepare the corpus again"):
        IdsOnly.of(size, end)
    parse(SOURCES["nanogpt"], {"path": str(tmp_path / "x.bin"), "vocab_size": end + 1, "eos_id": end})
