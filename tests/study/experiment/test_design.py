"""From an experiment's file to its runs; invalid experiments are refused with one message."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from bst_base.errors import UserError
from bst_dist.cli import main
from bst_dist.model.lm import LanguageModel
from bst_dist.study.experiment.config import load_experiment
from bst_dist.study.experiment.design import require_corpora, trials

ROOT = Path(__file__).resolve().parents[3]
FOLDERS = [ROOT / "launch/recipes" / name for name in ("ablations", "diagnostics")]
SHIPPED = sorted(path for folder in FOLDERS for path in folder.glob("*.yaml") if path.name != "base.yaml")
DIAGNOSTICS = [path for path in SHIPPED if path.parent.name == "diagnostics"]


@pytest.fixture
def make(tmp_path):
    """Function that writes an experiment with changed entries, and returns its runs."""
    base = {
        "model": {"width": 16, "heads": 2, "ffn": 32, "block": 8, "depth": 2, "mixer": "bst", "vocab_size": 300},
        "data": {"corpus": "none"},
        "train": {"steps": 4, "sequence_length": 16, "sequences": 2},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))

    def _make(**changes):
        data = {
            "name": "t",
            "question": "Does it?",
            "recipe": "base.yaml",
            "reference": "sliding",
            "seeds": [0, 1],
            "arms": {"sliding": {"model.mixer": "sliding"}, "bst": {}},
            **changes,
        }
        path = tmp_path / "experiment.yaml"
        data = {key: value for key, value in data.items() if value is not None}
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        experiment = load_experiment(path, [])
        return experiment, trials(experiment)

    return _make


def test_each_arm_is_run_for_each_condition_and_seed(make):
    _, found = make(conditions={"short": {}, "long": {"train": {"sequence_length": 32, "sequences": 1}}})
    assert [(t.seed, t.condition, t.arm) for t in found] == [
        (seed, condition, arm) for condition in ("short", "long") for seed in (0, 1) for arm in ("sliding", "bst")
    ]
    long = found[4].recipe
    assert (long.seed, long.model.mixer, long.train.sequence_length, long.train.steps) == (0, "sliding", 32, 4)
    assert len({trial.name for trial in found}) == 8


def test_equal_arms_of_two_experiments_share_the_run_name(make):
    _, one = make()
    _, other = make(name="other", question="And does that?", arms={"sliding": {"model.mixer": "sliding"}})
    assert other[0].name == one[0].name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"sliding": {"model.mixr": "sliding"}}}, "arm sliding: unknown key 'model.mixr'.*'model.mixer'"),
        ({"arms": {"sliding": {"model.mixer.kind": "x"}}}, "arm sliding: setting 'model.mixer.kind': 'mixer' is a val"),
        ({"reference": "full"}, "reference 'full' is not among the arms: sliding, bst"),
        ({"question": None}, "key 'question' is required"),
        ({"seed": [1]}, "unknown key 'seed': did you mean 'seeds'"),
        ({"seeds": [1, 1]}, "seeds holds a value twice"),
        ({"seeds": []}, "seeds: "),
        ({"recipe": "nowhere.yaml"}, "recipe nowhere.yaml: no such file beside it"),
        ({"arms": {"sliding": {}, "twin": {}}}, "arms sliding and twin are the same recipe"),
        ({"arms": {"sliding": {}, "long": {"train.steps": 8}}}, r"numbers of tokens \(sliding 128, long 256\)"),
        ({"arms": {"sliding": {"train.sequence_length": 12}}}, "arm sliding: .*not a multiple of model.block"),
        ({"measure": {"lengths": [16, 20]}}, r"measure.lengths 20 is not a multiple of the block, 8"),
        ({"measure": {"lengths": [16, 16]}}, "lengths holds a value twice"),
        ({"measure": {"time_to": 3.0}}, "measure.time_to needs evaluations on the way"),
        ({"measure": {"speed": True}}, "measure.speed needs log.every of at most train.steps, 4"),
        ({"measure": {"validation": False}}, "nothing is measured"),
    ],
)
def test_invalid_experiment_file_is_refused_with_the_reason(make, changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)


@pytest.mark.parametrize(("text", "message"), [("- a list", "expected settings"), ("a: [", "not readable as YAML")])
def test_base_file_that_is_not_a_recipe_is_refused(make, tmp_path, text, message):
    make()
    (tmp_path / "base.yaml").write_text(text)
    with pytest.raises(UserError, match=f"base.yaml: {message}"):
        trials(load_experiment(tmp_path / "experiment.yaml", []))


def test_missing_corpus_is_reported_before_training(make, tmp_path, capsys):
    _, found = make()
    with pytest.raises(UserError, match="none"):
        require_corpora(found)
    status = main(["experiment", "run", str(tmp_path / "experiment.yaml"), f"directory={tmp_path / 'out'}"])
    assert status == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_experiments_in_the_repository_are_valid(path):
    experiment = load_experiment(path, [])
    found = trials(experiment)
    assert len(found) == len(experiment.conditions) * len(experiment.arms) * len(experiment.seeds)
    assert len({trial.tokens for trial in found}) == 1


@pytest.mark.parametrize("path", DIAGNOSTICS, ids=lambda path: path.stem)
def test_arms_of_the_diagnostics_have_equal_parameters(path):
    sizes: dict[str, dict[str, int]] = {}
    for trial in trials(load_experiment(path, ["seeds=[0]"])):
        if trial.arm != "block-recurrent":  # its state ids have more parameters than the FFN can offset
            with torch.device("meta"):
                parameters = sum(p.numel() for p in LanguageModel(trial.recipe.model).parameters())
            sizes.setdefault(trial.condition, {})[trial.arm] = parameters
    assert all(max(found.values()) / min(found.values()) < 1.005 for found in sizes.values()), sizes


def test_measures_that_do_not_fit_the_data_are_refused(make):
    experiment = load_experiment(DIAGNOSTICS[0], ["measure={validation: true, task: true}"])
    with pytest.raises(UserError, match=r"a synthetic task has no text: set measure\.task"):
        trials(experiment)
    require_corpora(trials(load_experiment(DIAGNOSTICS[0], [])))  # synthetic tasks need no corpora
    with pytest.raises(UserError, match=r"measure\.task is for synthetic tasks \(data\.synthetic\)"):
        make(measure={"task": True})


def test_dry_run_lists_the_runs_and_writes_nothing(make, tmp_path, capsys):
    _, found = make()
    path, out = str(tmp_path / "experiment.yaml"), tmp_path / "out"
    assert main(["experiment", "run", path, f"directory={out}", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert all(trial.name in told for trial in found)
    assert "4 of 4 runs would be trained; nothing was started" in told
    assert main(["experiment", "run", path, f"directory={out}", "--dry-run", "--slurm", "3"]) == 0
    assert f"experiment run {path} directory={out} --workers 1 &" in capsys.readouterr().out
    assert not out.exists()


def test_status_counts_the_runs_of_each_arm(make, tmp_path, capsys):
    make()
    assert main(["experiment", "status", str(tmp_path / "experiment.yaml"), f"directory={tmp_path / 'out'}"]) == 0
    assert not (tmp_path / "out").exists()
    told = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["sliding", "0", "0", "2", "0", "0"] in told and ["bst", "0", "0", "2", "0", "0"] in told
    assert ["0%", "of", "the", "work", "is", "done"] in told
