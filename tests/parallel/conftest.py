"""Fixture that runs a function on several ranks of this machine, for tests of their communication."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

TIMEOUT_S = 120


@pytest.fixture
def on_ranks(tmp_path) -> Callable[..., list[Any]]:
    """``on_ranks(world, function, *args)`` runs `function(*args)` on `world` gloo ranks; returns their results.

    Ranks are forked, so they start at once and `function` may be a closure. The first failure ends all of them.
    """

    def run(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        context = multiprocessing.get_context("fork")
        store = tmp_path / f"store-{len(list(tmp_path.iterdir()))}"
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        ranks = [
            context.Process(target=_rank, args=(rank, world, store, sender, function, args), daemon=True)
            for rank, (_, sender) in enumerate(pipes)
        ]
        for rank in ranks:
            rank.start()
        try:
            return _collect([receiver for receiver, _ in pipes])
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()

    return run


def _collect(receivers: list) -> list[Any]:
    """Return the result of each rank. Raise AssertionError, with the traceback, if a rank fails."""
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        waiting = {receiver: rank for rank, receiver in enumerate(receivers) if rank not in results}
        ready = multiprocessing.connection.wait(list(waiting), timeout=TIMEOUT_S)
        assert ready, f"ranks {sorted(waiting.values())} said nothing for {TIMEOUT_S} s"
        for receiver in ready:
            failed, value = receiver.recv()
            assert not failed, f"rank {waiting[receiver]}:\n{value}"
            results[waiting[receiver]] = value
    return [results[rank] for rank in range(len(receivers))]


def _rank(rank: int, world: int, store, sender, function: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        sender.send((False, function(*args)))
        dist.barrier()  # no rank may leave while another still communicates
    except BaseException:
        sender.send((True, traceback.format_exc()))
