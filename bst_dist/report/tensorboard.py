"""Writer of TensorBoard event files: curves, probe results, and the run's entry on the HParams page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bst_base.files import path_in_errors
from bst_dist.config import Recipe, flat
from bst_dist.model.config import MIXER_SECTIONS
from bst_dist.report.metrics import ProbeReport, Report, Writer
from bst_dist.report.writers import scalars

FOLDER = "tensorboard"
HPARAMS = (
    "model.mixer",
    "model.context.variant",
    "model.ssm.kernel",
    "model.width",
    "model.depth",
    "model.heads",
    "model.ffn",
    "model.block",
    "train.sequence_length",
    "train.sequences",
    "train.steps",
    "train.precision",
    "optimizer.learning_rate",
    "optimizer.ssm_learning_rate",
    "optimizer.weight_decay",
    "seed",
    "parallel.sp",
    "deepspeed",
)
"""Fields of the recipe that are columns of the HParams page; the same in every run, so that runs can be compared."""
SHOWN = ("model.mixer", "model.context.variant", "model.ssm.kernel", "optimizer.learning_rate", "parameters")
"""Columns that the page shows by default. TensorBoard shows only five, and would choose them alphabetically."""
RESULTS = ("validation/bits_per_byte", "validation/loss_nats", "train/loss_nats", "train/tokens", "train/tokens_per_s")
"""Curves whose last value is shown on the HParams page."""
BINS = np.linspace(-1, 8, 181)
"""Bins of all histograms, whose values are decimal logarithms. With equal bins, steps can be compared."""


class TensorBoard(Writer):
    """Writer of a run's events. A resumed run hides the events after its checkpoint."""

    def __init__(self, run_dir: Path, start_step: int, hparams: dict[str, str | float]):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it
        from torch.utils.tensorboard.summary import hparams as summaries

        self.path = run_dir / FOLDER
        self._writer = SummaryWriter(str(self.path), purge_step=start_step + 1)
        experiment, begin, self._end = summaries(hparams, dict.fromkeys(RESULTS))
        _show_first(experiment, SHOWN)
        for summary in (experiment, begin):
            self._writer.file_writer.add_summary(summary)

    def write(self, report: Report) -> None:
        with path_in_errors(self.path):
            for name, value in scalars(report).items():
                self._writer.add_scalar(name, value, report.step)

    def write_probes(self, report: ProbeReport) -> None:
        with path_in_errors(self.path):
            for name, value in report.scalars.items():
                self._writer.add_scalar(name, value, report.step)
            for name, values in report.powers_of_ten.items():
                self._writer.add_histogram(name, values, report.step, bins=BINS)
            if report.sample is not None:
                self._writer.add_text("sample", report.sample, report.step)
            self._writer.flush()

    def close(self) -> None:
        self._writer.file_writer.add_summary(self._end)
        self._writer.close()


def hparams(recipe: Recipe, **more: str | float) -> dict[str, str | float]:
    """Return a run's values for the HParams page: fields of its recipe, "-" if no layer uses the field, and `more`."""
    values: dict[str, Any] = flat(recipe.model_dump(mode="json"))
    read = {section for mixer in recipe.model.mixers() for section in MIXER_SECTIONS[mixer]}
    for section in ("context", "ssm"):
        if section not in read:
            values |= {name: "-" for name in values if name.startswith(f"model.{section}.")}
    values["deepspeed"] = Path(recipe.deepspeed).stem
    return {name: values.get(name, "-") for name in HPARAMS} | more


def _show_first(experiment: Any, names: Sequence[str]) -> None:
    """Mark columns as different between runs, because TensorBoard shows such columns by default."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    plugin = experiment.value[0].metadata.plugin_data
    data = HParamsPluginData.FromString(plugin.content)
    for info in data.experiment.hparam_infos:
        info.differs = info.name in names
    plugin.content = data.SerializeToString()
