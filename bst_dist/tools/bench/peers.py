"""Layers of other packages, to measure beside ours. Only `bst bench layers` uses them.

They are installed at first use into a separate directory, without their dependencies (which would bring another torch).
So the project's environment stays as pinned.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from torch import Tensor, nn

from bst_base.errors import UserError

PACKAGES = [
    "block-recurrent-transformer-pytorch==0.4.4",
    "local-attention==1.11.2",
    "hyper-connections==0.4.11",
    "beartype==0.23.1",
    "memory-efficient-attention-pytorch==0.1.6",
]


class PeerError(UserError):
    """The peers could not be installed."""


def install() -> None:
    """Make the other packages importable; install them if missing. Raise PeerError if pip fails."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    directory = cache / "bst-dist" / "peers"
    stamp = directory / "installed.txt"
    if not stamp.is_file() or stamp.read_text() != "\n".join(PACKAGES):
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--upgrade",
            "--no-deps",
            "--target",
            str(directory),
            *PACKAGES,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PeerError(f"pip could not install the peers ({' '.join(PACKAGES)}); use --no-peers:\n{done.stderr}")
        stamp.write_text("\n".join(PACKAGES))
    if str(directory) not in sys.path:
        sys.path.append(str(directory))


class BlockRecurrentPeer(nn.Module):
    """One recurrent layer of block-recurrent-transformer-pytorch with SDPA. Its head of 16 tokens costs little."""

    def __init__(self, width: int, heads: int, block: int, length: int):
        super().__init__()
        from block_recurrent_transformer_pytorch import BlockRecurrentTransformer

        self.model = BlockRecurrentTransformer(
            num_tokens=16,
            dim=width,
            depth=1,
            dim_head=width // heads,
            heads=heads,
            max_seq_len=length,
            block_width=block,
            num_state_vectors=block,
            recurrent_layers=(1,),
            use_flash_attn=True,
        )

    def forward(self, x: Tensor) -> Tensor:
        ids = x.detach()[..., 0].abs().mul(8).long() % 16
        return self.model(ids)[0]


class LocalAttentionPeer(nn.Module):
    """One layer of local-attention: each window also attends to the previous one; with its own feed-forward network."""

    def __init__(self, width: int, heads: int, block: int):
        super().__init__()
        from local_attention.transformer import FeedForward, LocalMHA

        self.attention = LocalMHA(
            dim=width,
            window_size=block,
            dim_head=width // heads,
            heads=heads,
            causal=True,
            prenorm=True,
            qk_rmsnorm=True,
            use_rotary_pos_emb=True,
        )
        self.ffn = FeedForward(width, mult=4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.ffn(x)
