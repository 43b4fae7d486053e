"""Build the results in diagnostics.md from the tables of the experiments. No number on that page is typed by hand.

    python docs/study/diagnostics.py                          # from the tables in docs/study/diagnostics/
    python docs/study/diagnostics.py --from runs/experiments  # first copies the tables from there
    tar -xJf docs/study/diagnostics/runs.tar.xz -C runs/experiments  # finished runs, so as not to train them again

`bst experiment report` writes each table. With --from, the finished runs are also stored in runs.tar.xz: recipe,
outcome and evaluations of each, without weights. Only conditions with all runs done are shown and judged, by the rule
of diagnostics-registered.md (registered.py, decisions.py). The analysis of copying by depth comes first (copying.py).
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bst_dist.study.report.style import save
from data_pipeline.synthetic.unigram import LatentUnigram

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))
import copying  # noqa: E402 - these modules are in the folder of this script, which is not in a package
from decisions import decisions  # noqa: E402
from registered import HOURS, TABLES, Experiment, load  # noqa: E402

PAGE, ARCHIVE, FIGURES = HERE / "diagnostics.md", TABLES / "runs.tar.xz", HERE / "figures"
BEGIN, END = "<!-- from here on: docs/study/diagnostics.py -->", "<!-- to here -->"


def build(experiments: list[Experiment]) -> str:
    """Return the generated part of the page."""
    parts = _copying_answers, _standing, _tables, decisions, _missing
    return "\n".join(line for part in parts for line in part(experiments))


def _copying_answers(experiments: list[Experiment]) -> Iterator[str]:
    """Yield the answers to the main question: whether windows catch up at depths where their stack reaches the lag."""
    for experiment in experiments:
        if not (cells := _cells(experiment)):
            continue
        yield f"### {experiment.settings['question']}: does the advantage fall where windows reach the lag?"
        yield ""
        yield from copying.answer(cells, experiment.settings["reference"], _unfinished(experiment))
        yield ""
        yield f"![accuracy against depth, one panel per lag](figures/diagnostics-{experiment.name}.png)"
        yield ""
        yield "Grey: beyond the reach of the stack of windows. Dotted line: accuracy of guessing."
        yield ""


def _cells(experiment: Experiment) -> list[copying.Cell]:
    """Return the conditions with all runs done of an experiment on copying; none for other experiments."""
    if "copy" not in experiment.name.split("-"):
        return []
    return [
        copying.Cell(
            experiment.of(condition, "data.synthetic.lag"),
            experiment.of(condition, "model.depth"),
            experiment.hidden(condition),
            {arm: np.array(experiment.by_seed(condition, arm)) for arm in experiment.settings["arms"]},
        )
        for condition in experiment.settings["conditions"]
        if experiment.rows(condition)
    ]


def _unfinished(experiment: Experiment) -> list[int]:
    """Return the lags with an unfinished condition."""
    missing = (c for c in experiment.settings["conditions"] if not experiment.rows(c))
    return sorted({experiment.of(condition, "data.synthetic.lag") for condition in missing})


def draw_figures(experiments: list[Experiment]) -> None:
    """Draw a figure for each experiment on copying with at least one finished condition."""
    for experiment in experiments:
        if cells := _cells(experiment):
            chance = 1 / experiment.of(next(iter(experiment.settings["conditions"])), "data.synthetic.symbols")
            out = FIGURES / f"diagnostics-{experiment.name}.png"
            save(lambda cells=cells, chance=chance: copying.draw(cells, chance), out)


def _standing(experiments: list[Experiment]) -> Iterator[str]:
    every: dict[str, bool] = {}
    for experiment in experiments:
        for run, done in experiment.runs().items():
            every[run] = every.get(run, False) or done
    yield f"**{sum(every.values())} of {len(every)} runs are done.** By file; runs that two files share count in both:"
    yield ""
    yield "| file | runs done | conditions of which all runs are done |"
    yield "| --- | --- | --- |"
    for experiment in experiments:
        runs = experiment.runs()
        whole = sum(bool(experiment.rows(c)) for c in experiment.settings["conditions"])
        yield (
            f"| `{experiment.name}.yaml` | {sum(runs.values())} of {len(runs)} | {whole} of "
            f"{len(experiment.settings['conditions'])} |"
        )
    yield ""


def _tables(experiments: list[Experiment]) -> Iterator[str]:
    for experiment in experiments:
        whole = [c for c in experiment.settings["conditions"] if experiment.rows(c)]
        if not whole:
            continue
        reference = experiment.settings["reference"]
        yield f"### {experiment.settings['question']}"
        yield ""
        yield (
            f"`bst experiment report launch/recipes/diagnostics/{experiment.name}.yaml`; ± is the standard error "
            f"over seeds, differences are from `{reference}`, paired by seed, and * marks a 95 % interval "
            f"(Student's t) without zero. {experiment.table['trained_with']}"
        )
        yield ""
        yield "| condition | arm | parameters | accuracy | loss, nats per label | difference in loss | best in reach |"
        yield "| --- | --- | --- | --- | --- | --- | --- |"
        for condition in whole:
            for arm, row in experiment.rows(condition).items():
                difference = row["difference"].get("loss_nats")
                star = " *" if difference and difference["apart"] else ""
                yield (
                    f"| {condition} | {arm} | {row['parameters']:,} | {_level(row, 'accuracy')} | "
                    f"{_level(row, 'loss_nats')} | {_level(difference, signed=True)}{star} | "
                    f"{_in_reach(experiment, condition, arm)} |"
                )
        yield ""


def _level(row: dict[str, Any] | None, column: str = "", signed: bool = False) -> str:
    found = row["measured"][column] if row and column else row
    if not found:
        return ""
    sign = "+" if signed else ""
    return f"{found['value']:{sign}.4f}" + (f" ± {e:.4f}" if (e := found["standard_error"]) is not None else "")


def _in_reach(experiment: Experiment, condition: str, arm: str) -> str:
    """Return the least possible loss for the tokens that an arm sees; an arm with a state sees the whole past."""
    if experiment.of(condition, "data.synthetic.task") != "latent-unigram":
        return ""
    task = LatentUnigram(
        task="latent-unigram",
        symbols=experiment.of(condition, "data.synthetic.symbols"),
        concentration=experiment.of(condition, "data.synthetic.concentration"),
    )
    length = experiment.of(condition, "train.sequence_length")
    reach = experiment.reach(condition) if arm in ("sliding", "no-ssm") else length
    return f"{best_within(task, reach, length):.4f}"


def best_within(task: LatentUnigram, reach: int, length: int) -> float:
    """Return nats per label of the best prediction from the last `reach` tokens, over a row of `length` labels."""
    seen = [min(before, reach) for before in range(1, length + 1)]
    cost = {n: task.best_loss(n, n) for n in set(seen)}
    return float(np.mean([cost[n] for n in seen]))


def _missing(experiments: list[Experiment]) -> Iterator[str]:
    yield "### What is missing"
    yield ""
    hours = 0.0
    for e in experiments:
        runs = e.runs()
        missing = len(runs) - sum(runs.values())
        hours += HOURS[e.name] * missing / len(runs)
        if missing:
            yield f"- `bst experiment run launch/recipes/diagnostics/{e.name}.yaml`: {missing} of {len(runs)} runs"
    yield ""
    yield f"By the registered estimate about {hours:.0f} hours of one core are missing." if hours else "Nothing."


def rewrite(page: str, generated: str) -> str:
    """Return the page with the part between the marks replaced."""
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{generated}\n\n{END}{after}"


def copy_tables(source: Path) -> None:
    """Copy the tables that the experiments have written under `source`."""
    for name in HOURS:
        table = source / f"diagnostics-{name}" / "table.json"
        if table.exists():
            shutil.copy(table, TABLES / f"{name}.json")


def keep_runs(source: Path, archive: Path = ARCHIVE) -> None:
    """Add to the archive those files of finished runs under `source` that a table needs: evaluations, not weights."""
    kept = read_archive(archive)
    for run in sorted((source / "runs").iterdir()):
        outcome = run / "outcome.json"
        if not (outcome.exists() and json.loads(outcome.read_text())["finished"]):
            continue
        for name in ("recipe.yaml", "environment.json", "outcome.json"):
            kept[f"runs/{run.name}/{name}"] = (run / name).read_text()
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        steps = [line for line in lines if json.loads(line)["kind"] == "train"]
        kept[f"runs/{run.name}/metrics.jsonl"] = "".join(
            line for line in lines if json.loads(line)["kind"] == "eval" or line is steps[-1]
        )
    with tarfile.open(archive, "w:xz") as tar:
        for name, text in sorted(kept.items()):
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            tar.addfile(entry, io.BytesIO(text.encode()))


def read_archive(archive: Path) -> dict[str, str]:
    """Return name -> text of the files in the archive; empty if there is no archive yet."""
    if not archive.exists():
        return {}
    with tarfile.open(archive) as tar:
        return {entry.name: tar.extractfile(entry).read().decode() for entry in tar}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--from", dest="source", type=Path, help="where the experiments have written their tables")
    source = parser.parse_args().source
    if source:
        copy_tables(source)
        keep_runs(source)
    draw_figures(load())
    PAGE.write_text(rewrite(PAGE.read_text(), build(load())))
