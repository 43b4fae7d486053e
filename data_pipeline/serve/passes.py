"""The number of passes over each corpus: reported before a run starts, and limited by `max_passes`."""

from __future__ import annotations

from bst_base.errors import UserError
from data_pipeline.serve.loader import Loader


def passes_message(loader: Loader, steps: int) -> str:
    """Return a message with the passes over each corpus before a step.

    Raises UserError when they are more than `max_passes` allows.
    """
    passes = dict(zip(loader.config.urls(), loader.passes(steps), strict=True))
    most = max(passes, key=lambda url: passes[url])
    limit = loader.config.max_passes
    if limit is not None and passes[most] > limit:
        raise UserError(
            f"{most}: {passes[most]:,.2f} passes by step {steps:,}, more than data.max_passes {limit:g}: take fewer "
            "steps, prepare more text, or raise data.max_passes"
        )
    listed = ", ".join(f"{count:,.2f} passes over {url}" for url, count in passes.items())
    if loader.config.documents == "isolated":
        listed += f" ({', '.join(f'{share:.0%}' for share in loader.padding())} padding between isolated documents)"
    return f"by step {steps:,}: {listed}"
