"""Reach and documents: on pairs whose advantage by place and by document is known."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest

from bst_dist.study.laws import analysis, table
from bst_dist.study.laws.joint import JointFit
from bst_dist.study.laws.law import Law
from bst_dist.study.laws.reach import compare_reach
from bst_dist.study.laws.table import Row

LAW = Law(E=1.0, A=1.0, alpha=0.3, B=1.0, beta=0.3)


def rows(late=0.0, by_document=(), noise=0.002, seed=0, sizes=(1e5, 2e5, 4e5)):
    """Pairs whose variant is 1 % better in the first block and 1 % + `late` in the last."""
    generator, found = np.random.default_rng(seed), []
    for size in sizes:
        for depth in (2, 8):
            for draw in range(2):
                for multiple in (5.0, 10.0):
                    for name in ("sliding", "bst"):
                        gain = np.array((0.01, 0.01 + late)) * (name == "bst")
                        loss = 1 + 20 * size**-0.3 + 20 * (size * multiple) ** -0.3
                        places = loss * np.exp(generator.normal(0, noise, 2) - gain)
                        documents = [loss * math.exp(-g * (name == "bst")) for g in by_document]
                        found.append(Row(
                            run=f"{name} {size} {depth} {draw} {multiple}", trunk=f"{name} {size} {depth} {draw}",
                            status="done", arm="all", architecture=name, size=size, depth=depth, width=64, seed=draw,
                            tokens_per_parameter=multiple, block=f"{size} {depth} {draw}", parameters=size,
                            parameters_total=int(size), parameters_non_embedding=int(size), parameters_kernel=0,
                            parameters_matrices=int(size), flops_per_token={"ffn": 2 * size}, time_s=1.0,
                            tokens=int(size * multiple), flops=6 * size**2 * multiple, loss_nats=places.mean(),
                            loss_by_block=tuple(places), loss_by_document=tuple(documents),
                        ))  # fmt: skip
    return found


def test_an_advantage_that_grows_along_the_sequence_is_another_reach():
    reach = compare_reach(rows(late=0.01), "bst", "sliding")
    assert reach.difference == pytest.approx(0.01, abs=4 * reach.standard_error)
    assert not reach.equal


def test_equal_reach_is_called_unequal_as_often_as_the_level_says():
    wrong = sum(not compare_reach(rows(seed=seed), "bst", "sliding").equal for seed in range(200))
    assert 2 <= wrong <= 20  # 10 expected, binomial standard deviation 3


def test_without_losses_by_position_nothing_is_said():
    bare = [row.model_copy(update={"loss_by_block": ()}) for row in rows()]
    assert compare_reach(bare, "bst", "sliding") is None


def test_one_irreducible_loss_is_fitted_only_to_those_whose_reach_was_found_equal(monkeypatch):
    monkeypatch.setattr(analysis, "_laws_of", lambda *_: {})
    monkeypatch.setattr(analysis, "fit_shared", lambda points: JointFit(dict.fromkeys(points.group, LAW), 0.0, 0.0))
    monkeypatch.setattr(analysis, "shared_e_p_value", lambda points, draws: 0.5)
    further = [row.model_copy(update={"architecture": "mf"}) for row in rows(late=0.02) if row.architecture == "bst"]
    report = analysis.fit_report(rows(seed=1) + further, "sliding")
    assert (report["reach"]["bst"]["equal"], report["reach"]["mf"]["equal"]) == (True, False)
    assert set(report["shared_E"]["laws"]) == {"sliding", "bst"}
    alone = analysis.fit_report(rows(late=0.02), "sliding")
    assert "no architecture was found to see as far" in alone["shared_E"]["not_fitted"]


def test_gaps_by_document_are_those_put_in():
    found = analysis.compare_report(rows(by_document=(0.02, -0.01, 0.03)), "sliding", "flops", draws=99)
    by = found["variants"]["bst"]["by_document"]
    assert (by["documents"], by["better"]) == (3, 2)
    assert by["mean"] == pytest.approx(0.04 / 3)
    assert by["standard_error"] == pytest.approx(np.std((0.02, -0.01, 0.03), ddof=1) / math.sqrt(3))


def test_the_table_as_csv_has_a_row_a_run_and_a_column_a_value(tmp_path):
    written = rows()
    table.write_csv(written, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [row["run"] for row in read] == [row.run for row in written]
    assert float(read[3]["loss_nats"]) == written[3].loss_nats
