"""Builds the results in diagnostics.md from the tables of the experiments: no number on that page is typed.

    python docs/study/diagnostics.py                          # from the tables in docs/study/diagnostics/
    python docs/study/diagnostics.py --from runs/experiments  # first copies them from there
    tar -xJf docs/study/diagnostics/runs.tar.xz -C runs/experiments  # what is done need not be trained again elsewhere

`bst experiment report` writes each table. With --from, the finished runs are kept as well, in runs.tar.xz: recipe,
outcome and evaluations of each, without weights. Only conditions of which all runs are done are shown and judged, by
the rule of diagnostics-registered.md. What copying says about depth comes first (copying.py).
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy import stats

from bst_dist.study.report.style import save
from data_pipeline.synthetic.unigram import LatentUnigram

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))
import copying  # noqa: E402 - it lies beside this program, which is no part of a package

RECIPES, TABLES, PAGE = HERE.parents[1] / "launch/recipes/diagnostics", HERE / "diagnostics", HERE / "diagnostics.md"
ARCHIVE = TABLES / "runs.tar.xz"
FIGURES = HERE / "figures"
FILES = ("small-unigram", "small-copy", "seeds-unigram", "reach", "seeds-copy", "small-unigram-others",
         "small-copy-others", "unigram", "copy")  # fmt: skip
BEGIN, END = "<!-- from here on: docs/study/diagnostics.py -->", "<!-- to here -->"
HOURS = {"small-unigram": 0.6, "small-copy": 4.4, "seeds-unigram": 1.8, "reach": 3.0, "seeds-copy": 8.8,
         "small-unigram-others": 0.6, "small-copy-others": 4.4, "unigram": 4.4, "copy": 18.0}  # fmt: skip
"""The registered estimates, of one unshared core; those of the additions in proportion to their steps."""
P1_MOST, P2_LEAST, P3_LEAST = 0.08, 0.5, 0.125


@dataclass(frozen=True)
class Experiment:
    """One file of the diagnostics, with the table of what is done of it."""

    name: str
    settings: dict[str, Any]
    table: dict[str, Any] | None

    def of(self, condition: str, setting: str) -> Any:
        """A setting in a condition, by its dotted name."""
        base = yaml.safe_load((RECIPES / self.settings["recipe"]).read_text())
        for layer in (self.settings["conditions"][condition], self.settings["settings"], base):
            found = _at(layer, setting)
            if found is not None:
                return found
        raise KeyError(setting)

    def rows(self, condition: str) -> dict[str, dict[str, Any]]:
        """Arm -> its row of the table, in the order of the file; empty unless all runs of the condition are done."""
        rows = {row["arm"]: row for row in (self.table or {"rows": []})["rows"] if row["condition"] == condition}
        whole = set(rows) == set(self.settings["arms"]) and all(
            set(row["seeds"]) == {str(s) for s in self.settings["seeds"]} and set(row["seeds"].values()) == {"done"}
            for row in rows.values()
        )
        return {arm: rows[arm] for arm in self.settings["arms"]} if whole else {}

    def runs(self) -> dict[str, bool]:
        """What a run is of, so that shared ones are counted once -> whether it is done."""
        done = {(row["condition"], row["arm"], int(seed)): status == "done"
                for row in (self.table or {"rows": []})["rows"] for seed, status in row["seeds"].items()}  # fmt: skip
        common = json.dumps(self.settings["settings"], sort_keys=True)
        return {
            json.dumps([common, self.settings["conditions"][condition], arm, settings, seed], sort_keys=True):
            done.get((condition, arm, seed), False)
            for condition in self.settings["conditions"] for arm, settings in self.settings["arms"].items()
            for seed in self.settings["seeds"]
        }  # fmt: skip


def _at(layer: dict[str, Any], dotted: str) -> Any:
    """A value in settings that may be nested, dotted, or both."""
    if dotted in layer:
        return layer[dotted]
    for name, value in layer.items():
        if dotted.startswith(f"{name}.") and isinstance(value, dict):
            return _at(value, dotted.removeprefix(f"{name}."))
    return None


def load(tables: Path = TABLES) -> list[Experiment]:
    """Every file of the diagnostics in the registered order."""
    found = []
    for name in FILES:
        path = tables / f"{name}.json"
        settings = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
        found.append(Experiment(name, settings, json.loads(path.read_text()) if path.exists() else None))
    return found


def build(experiments: list[Experiment]) -> str:
    """The generated part of the page."""
    parts = _copying_answers, _standing, _tables, _decisions, _missing
    return "\n".join(line for part in parts for line in part(experiments))


def _copying_answers(experiments: list[Experiment]) -> Iterator[str]:
    """First of all what was asked: whether windows catch up where their stack reaches the lag."""
    for experiment in experiments:
        if not (cells := _cells(experiment)):
            continue
        yield f"### {experiment.settings['question']}: does the advantage fall where windows reach the lag?"
        yield ""
        yield from copying.answer(cells, experiment.settings["reference"])
        yield ""
        yield f"![accuracy against depth, a panel a lag](figures/diagnostics-{experiment.name}.png)"
        yield ""
        yield "Grey: a stack of windows cannot tell the label. Dotted: a guess."
        yield ""


def _cells(experiment: Experiment) -> list[copying.Cell]:
    """The whole conditions of an experiment on copying."""
    if "copy" not in experiment.name.split("-"):
        return []
    return [
        copying.Cell(
            experiment.of(condition, "data.synthetic.lag"), experiment.of(condition, "model.depth"),
            _hidden(experiment, condition),
            {arm: np.array(_seeds(experiment, condition, arm)) for arm in experiment.settings["arms"]},
        )
        for condition in experiment.settings["conditions"] if experiment.rows(condition)
    ]  # fmt: skip


def draw_figures(experiments: list[Experiment]) -> None:
    """A figure for each experiment on copying of which something is whole."""
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
        yield (f"| `{experiment.name}.yaml` | {sum(runs.values())} of {len(runs)} | {whole} of "
               f"{len(experiment.settings['conditions'])} |")  # fmt: skip
    yield ""


def _tables(experiments: list[Experiment]) -> Iterator[str]:
    for experiment in experiments:
        whole = [c for c in experiment.settings["conditions"] if experiment.rows(c)]
        if not whole:
            continue
        reference = experiment.settings["reference"]
        yield f"### {experiment.settings['question']}"
        yield ""
        yield (f"`bst experiment report launch/recipes/diagnostics/{experiment.name}.yaml`; ± is the standard error "
               f"over seeds, differences are from `{reference}`, paired by seed, and * marks a 95 % interval "
               f"(Student's t) without zero. {experiment.table['trained_with']}")  # fmt: skip
        yield ""
        yield "| condition | arm | parameters | accuracy | loss, nats per label | difference in loss | best in reach |"
        yield "| --- | --- | --- | --- | --- | --- | --- |"
        for condition in whole:
            for arm, row in experiment.rows(condition).items():
                difference = row["difference"].get("loss_nats")
                star = " *" if difference and difference["apart"] else ""
                yield (f"| {condition} | {arm} | {row['parameters']:,} | {_level(row, 'accuracy')} | "
                       f"{_level(row, 'loss_nats')} | {_level(difference, signed=True)}{star} | "
                       f"{_in_reach(experiment, condition, arm)} |")  # fmt: skip
        yield ""


def _level(row: dict[str, Any] | None, column: str = "", signed: bool = False) -> str:
    found = row["measured"][column] if row and column else row
    if not found:
        return ""
    sign = "+" if signed else ""
    return f"{found['value']:{sign}.4f}" + (f" ± {e:.4f}" if (e := found["standard_error"]) is not None else "")


def _in_reach(experiment: Experiment, condition: str, arm: str) -> str:
    """The best possible loss of what an arm sees; of arms with a state, of the whole past."""
    if experiment.of(condition, "data.synthetic.task") != "latent-unigram":
        return ""
    task = LatentUnigram(
        task="latent-unigram", symbols=experiment.of(condition, "data.synthetic.symbols"),
        concentration=experiment.of(condition, "data.synthetic.concentration"),
    )  # fmt: skip
    length = experiment.of(condition, "train.sequence_length")
    reach = _reach(experiment, condition) if arm in ("sliding", "no-ssm") else length
    return f"{best_within(task, reach, length):.4f}"


def best_within(task: LatentUnigram, reach: int, length: int) -> float:
    """Nats per label of the best prediction from the last `reach` tokens, over a row of `length` labels."""
    seen = [min(before, reach) for before in range(1, length + 1)]
    cost = {n: task.best_loss(n, n) for n in set(seen)}
    return float(np.mean([cost[n] for n in seen]))


def _reach(experiment: Experiment, condition: str) -> int:
    """Tokens that a stack of windows sees, the current one included."""
    return experiment.of(condition, "model.depth") * (experiment.of(condition, "model.block") - 1) + 1


def _decisions(experiments: list[Experiment]) -> Iterator[str]:
    yield "### By the registered rule"
    yield ""
    sizes = {"small": [e for e in experiments if e.name.startswith("small")],
             "small, six more seeds": [e for e in experiments if e.name.startswith("seeds")],
             "full size": [e for e in experiments if e.name in ("unigram", "copy")]}  # fmt: skip
    for size, own in sizes.items():
        lines = [*_copying(own), *_unigram(own)]
        yield from [f"- {size}, {line}" for line in lines] or [f"- {size}: no condition is whole."]
    yield from (f"- small, {reach_verdict(e)}" for e in experiments if e.name == "reach")
    yield ""


def _copying(experiments: list[Experiment]) -> Iterator[str]:
    """P1 to P3, each over all whole conditions that it is about."""
    cells = [(e, c) for e in experiments if e.name.endswith("copy") for c in e.settings["conditions"] if e.rows(c)]
    if not cells:
        return
    hidden = [(e, c) for e, c in cells if _hidden(e, c)]
    seen = [(e, c) for e, c in cells if not _hidden(e, c)]
    yield _judged("P1", [(c, arm, value <= P1_MOST, value) for e, c in hidden for arm in ("sliding", "no-ssm")
                         for value in _seeds(e, c, arm)])  # fmt: skip
    yield _judged("P2", [(c, "sliding", v > P2_LEAST, v) for e, c in seen for v in _seeds(e, c, "sliding")])
    yield _judged("P3", [(c, "bst-sh", v > P3_LEAST, v) for e, c in cells for v in _seeds(e, c, "bst-sh")])


def _hidden(experiment: Experiment, condition: str) -> bool:
    """Whether windows cannot tell the label: n (W - 1) < lag - 1."""
    return _reach(experiment, condition) < experiment.of(condition, "data.synthetic.lag")


def _seeds(experiment: Experiment, condition: str, arm: str, column: str = "accuracy") -> list[float]:
    return list(experiment.rows(condition)[arm]["measured"][column]["by_seed"].values())


def _judged(name: str, cells: list[tuple[str, str, bool, float]]) -> str:
    if not cells:
        return f"**{name}**: no condition that it is about is whole."
    against = [f"{condition}, {arm}: {value:.3f}" for condition, arm, holds, value in cells if not holds]
    verdict = "holds" if not against else "does not hold"
    return f"**{name}** {verdict}: {len(cells) - len(against)} of {len(cells)} runs are as predicted" + (
        f"; against it {'; '.join(against)}." if against else "."
    )


def _unigram(experiments: list[Experiment]) -> Iterator[str]:
    """P4 and P5 by the ratio of the advantages at 8 and at 2 layers, a ratio a seed; P6 by means."""
    for e in (e for e in experiments if e.name.endswith("unigram")):
        whole = [c for c in e.settings["conditions"] if e.rows(c)]
        gains = {c: np.subtract(_seeds(e, c, "sliding", "loss_nats"), _seeds(e, c, "bst-sh", "loss_nats"))
                 for c in whole}  # fmt: skip
        if {"2 layers", "8 layers"} <= set(gains):
            ratios = gains["8 layers"] / gains["2 layers"]
            yield f"**P4, P5**: {ratio_verdict(ratios)}"
            yield difference(gains["2 layers"] - gains["8 layers"])
        behind = [c for c in whole if e.rows(c)["no-ssm"]["measured"]["loss_nats"]["value"]
                  < e.rows(c)["bst-sh"]["measured"]["loss_nats"]["value"]]  # fmt: skip
        if whole:
            yield (f"**P6** {'does not hold' if behind else 'holds'} in the means of {len(whole) - len(behind)} of "
                   f"{len(whole)} depths.")  # fmt: skip


def ratio_verdict(ratios: np.ndarray) -> str:
    """By the interval of the mean ratio: below 1/4 for P5, above 1/2 for P4."""
    mean = float(ratios.mean())
    half = float(stats.t.ppf(0.975, len(ratios) - 1) * ratios.std(ddof=1) / np.sqrt(len(ratios)))
    low, high = mean - half, mean + half
    answer = "P5 holds" if high < 0.25 else "P4 holds" if low > 0.5 else "undecided"
    each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    return (f"{answer}. The advantage at 8 layers over that at 2 is {each} by seed, {mean:.2f} in the mean (95 % "
            f"interval {low:.1f} to {high:.1f}).")  # fmt: skip


def difference(falls: np.ndarray) -> str:
    """Of the advantages at 2 and at 8 layers, a value a seed: it can be told apart where their ratio, which has a
    small number below, cannot. Not part of the rule."""
    low, high = copying.interval(falls)
    return (f"the advantage at 2 layers minus that at 8, which the rule does not ask for, is {falls.mean():+.4f} nats "
            f"per label in the mean (95 % interval {low:+.3f} to {high:+.3f}).")  # fmt: skip


def reach_verdict(experiment: Experiment) -> str:
    """P7: whether windows learn with more steps, at one of the rates, to copy what they can see."""
    rates = experiment.settings["conditions"]
    if not all(experiment.rows(rate) for rate in rates):
        return "**P7**: not all runs that it is about are done."
    found = {rate: _seeds(experiment, rate, "sliding") for rate in rates}
    learnt = [value > P2_LEAST for values in found.values() for value in values]
    answer = ("holds" if any(min(values) > P2_LEAST for values in found.values())
              else "depends on the seed" if any(learnt) else "does not hold")  # fmt: skip
    each = "; ".join(f"{rate}: {', '.join(f'{value:.3f}' for value in values)}" for rate, values in found.items())
    return f"**P7** {answer}: accuracy of `sliding` by seed, {each}."


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
    """The page with the part between the marks replaced."""
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{generated}\n\n{END}{after}"


def copy_tables(source: Path) -> None:
    """The tables that the experiments have written under `source`."""
    for name in FILES:
        table = source / f"diagnostics-{name}" / "table.json"
        if table.exists():
            shutil.copy(table, TABLES / f"{name}.json")


def keep_runs(source: Path, archive: Path = ARCHIVE) -> None:
    """Keep what the finished runs under `source` have left that a table is made of, beside what the archive holds."""
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
    """Name -> text of what is kept; nothing before the first time."""
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
