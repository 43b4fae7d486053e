"""CompleteP's learning rates, weight decays and epsilons by group, in every ZeRO stage and after a resume."""

from __future__ import annotations

from typing import Any

import pytest

from bst_base.json_lines import read_lines
from bst_dist.config import load_recipe
from bst_dist.parallel.ranks import Ranks
from bst_dist.report.metrics import FILE
from bst_dist.train import building
from bst_dist.train.run import train
from bst_dist.train.schedule import factor
from bst_dist.train.start.request import Request, load, resolve

pytestmark = [pytest.mark.ranks, pytest.mark.usefixtures("unmeasured")]


def test_every_stage_keeps_completep_group_settings_after_a_resume(recipe_file, tmp_path, on_ranks):
    base = {"kind": "completep", "base_width": 4, "base_depth": 1}
    recipe = recipe_file(optimizer={"learning_rate": 2e-3, "ssm_learning_rate": 5e-4, "weight_decay": 0.3})

    def groups_of(ranks: Ranks) -> list[dict[str, Any]]:
        found = []
        for stage in range(4):
            changes = [f"deepspeed=ds_configs/zero{stage}.json", f"model.parametrisation={base}"]
            for until in (2, 4):
                request = Request(recipe, changes, tmp_path / f"run{stage}", True, until)
                train(request, ranks)
            engine = building.build_engine(resolve(load(request), request, ranks.world), ranks)
            for group in engine.deepspeed.optimizer.param_groups:
                group.update(lr=9.0, weight_decay=9.0, eps=9.0)  # as if loading had mixed up the groups
            engine.set_rates(1.0)
            keys = ("lr", "weight_decay", "eps")
            own = zip(engine.groups.names, engine.deepspeed.optimizer.param_groups, strict=True)
            found.append({name: tuple(group[key] for key in keys) for name, group in own})
        return found

    for groups in on_ranks(2, groups_of)[0]:
        wide = groups["vectors"][0] / groups["matrices"][0]
        assert wide > 1
        assert groups["matrices"][1] == pytest.approx(0.3 * wide)
        assert groups["ssm"][:2] == (5e-4, 0.0)
        assert groups["embedding"] == pytest.approx((2e-3, 0.0, 1e-8 / wide))
        assert groups["matrices"][2] == groups["ssm"][2] < groups["embedding"][2]
    schedule = load_recipe(tmp_path / "run0/recipe.yaml").schedule
    rates = [line["learning_rate"] for line in read_lines(tmp_path / "run0" / FILE) if line["kind"] == "train"]
    assert rates == pytest.approx([2e-3 * factor(schedule, step, 4) for step in range(4)])  # the recipe's, at any width
