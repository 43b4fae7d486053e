"""The registered diagnostics: their files in order, and which runs are done. diagnostics.py uses this module."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
RECIPES, TABLES = HERE.parents[1] / "launch/recipes/diagnostics", HERE / "diagnostics"
HOURS = {
    "small-unigram": 0.6,
    "small-copy": 4.4,
    "seeds-unigram": 1.8,
    "reach": 3.0,
    "seeds-copy": 8.8,
    "states-copy": 2.9,
    "states-recall": 3.8,
    "small-unigram-others": 0.6,
    "small-copy-others": 4.4,
    "unigram": 4.4,
    "copy": 18.0,
}
"""File -> estimated hours on one unshared core, in the registered order. The estimates of the additions are in
proportion to their steps."""


@dataclass(frozen=True)
class Experiment:
    """One file of the diagnostics, with the table of its finished runs."""

    name: str
    settings: dict[str, Any]
    table: dict[str, Any] | None

    def of(self, condition: str, setting: str) -> Any:
        """Return a setting in a condition, by its dotted name."""
        base = yaml.safe_load((RECIPES / self.settings["recipe"]).read_text())
        for layer in (self.settings["conditions"][condition], self.settings["settings"], base):
            found = _at(layer, setting)
            if found is not None:
                return found
        raise KeyError(setting)

    def rows(self, condition: str) -> dict[str, dict[str, Any]]:
        """Return arm -> row of the table, in the order of the file; empty unless all runs of the condition are done."""
        rows = {row["arm"]: row for row in (self.table or {"rows": []})["rows"] if row["condition"] == condition}
        whole = set(rows) == set(self.settings["arms"]) and all(
            set(row["seeds"]) == {str(s) for s in self.settings["seeds"]} and set(row["seeds"].values()) == {"done"}
            for row in rows.values()
        )
        return {arm: rows[arm] for arm in self.settings["arms"]} if whole else {}

    def reach(self, condition: str) -> int:
        """Return the number of tokens that a stack of windows sees, including the current one."""
        return self.of(condition, "model.depth") * (self.of(condition, "model.block") - 1) + 1

    def hidden(self, condition: str) -> bool:
        """Whether the label is beyond the reach of the windows: n (W - 1) < lag - 1."""
        return self.reach(condition) < self.of(condition, "data.synthetic.lag")

    def by_seed(self, condition: str, arm: str, column: str = "accuracy") -> list[float]:
        """Return the measurements of an arm, one value per seed."""
        return list(self.rows(condition)[arm]["measured"][column]["by_seed"].values())

    def runs(self) -> dict[str, bool]:
        """Return key of a run -> whether it is done. Runs that two files share have the same key and count once."""
        done = {
            (row["condition"], row["arm"], int(seed)): status == "done"
            for row in (self.table or {"rows": []})["rows"]
            for seed, status in row["seeds"].items()
        }
        common = json.dumps(self.settings["settings"], sort_keys=True)
        return {
            json.dumps([common, self.settings["conditions"][condition], arm, settings, seed], sort_keys=True): done.get(
                (condition, arm, seed), False
            )
            for condition in self.settings["conditions"]
            for arm, settings in self.settings["arms"].items()
            for seed in self.settings["seeds"]
        }


def _at(layer: dict[str, Any], dotted: str) -> Any:
    """Return a value from settings with nested or dotted keys, or both; None if it is missing."""
    if dotted in layer:
        return layer[dotted]
    for name, value in layer.items():
        if dotted.startswith(f"{name}.") and isinstance(value, dict):
            return _at(value, dotted.removeprefix(f"{name}."))
    return None


def load(tables: Path = TABLES) -> list[Experiment]:
    """Load every file of the diagnostics, in the registered order."""
    found = []
    for name in HOURS:
        path = tables / f"{name}.json"
        settings = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
        found.append(Experiment(name, settings, json.loads(path.read_text()) if path.exists() else None))
    return found
