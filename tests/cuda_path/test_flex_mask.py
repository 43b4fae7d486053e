"""FlexAttention's mask and the tiles that it visits, compared with torch's own block mask."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from bst_dist.model.attention.documents import documents_by
from bst_dist.model.attention.flex_mask import Band, block_mask, visited_tiles
from bst_dist.model.attention.window import Window


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize(("before", "window", "length"), [(0, 128, 512), (128, 200, 384), (96, 96, 480), (7, 129, 300)])
def test_visited_tiles_equal_those_of_a_torch_block_mask(before, window, length, include_self):
    torch.manual_seed(0)
    begins = torch.rand(3, before + length).lt(0.02).cumsum(1)
    begins[1] = 0
    documents = documents_by(begins, 2, length)
    band = Band(length, before + length, Window(window, include_self))
    for begin in (None, documents.begin):
        rows = None if begin is None else len(begin)
        ours = block_mask(band, begin, visited_tiles(band, "cpu", begin))
        torchs = create_block_mask(band.mask(begin), rows, None, length, before + length, "cpu")
        assert torch.equal(ours.to_dense(), torchs.to_dense())
        assert torch.equal(ours.full_kv_num_blocks, torchs.full_kv_num_blocks)
        for kind in ("q", "full_q"):  # used by the backward pass
            counts = getattr(ours, f"{kind}_num_blocks")
            assert torch.equal(counts, getattr(torchs, f"{kind}_num_blocks"))
            for place in counts.nonzero().tolist():
                used = slice(0, int(counts[tuple(place)]))
                found, known = (getattr(mask, f"{kind}_indices")[tuple(place)][used] for mask in (ours, torchs))
                assert torch.equal(found, known.sort().values)


def test_inductor_generates_code_for_the_arithmetic_of_the_tiles(monkeypatch):
    """This is the part of the path that Inductor's CPU code generator supports; it once failed on floor divisions."""
    from torch._inductor import graph

    made = []
    monkeypatch.setattr(graph.GraphLowering, "compile_to_module", lambda self: made.append(self.codegen()))
    compiled = torch.compile(lambda x: visited_tiles(Band(512, 640, Window(128)), x.device), fullgraph=True)
    with contextlib.suppress(Exception):  # code is generated but not compiled
        compiled(torch.zeros(1))
    assert made
