from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest

from bst_dist.cli import main
from bst_dist.study.ablation import measure
from bst_dist.study.ablation.command import plan
from bst_dist.study.evaluation.trained import Trained, open_run


def test_ablate_command_reports_plots_and_agrees_with_eval(make_run, tmp_path, capsys):
    run_dir, path = make_run(), tmp_path / "report.json"
    assert main(["ablate", str(run_dir), "--tokens", "100000", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    (figures,) = report["corpora"]
    assert main(["eval", str(run_dir), "--json", str(path)]) == 0
    (evaluated,) = json.loads(path.read_text())["corpora"]
    for key in (
        "documents",
        "tokens",
        "bytes",
        "loss_nats_per_token",
        "loss_nats_per_token_standard_error",
        "bits_per_byte",
    ):
        assert figures[key] == pytest.approx(evaluated[key], rel=1e-6)
    assert (run_dir / "ablations.png").read_bytes()[:4] == b"\x89PNG"
    lines = {(line["intervention"], tuple(line["layers"])): line for line in figures["interventions"]}
    assert {layers for _, layers in lines} == {(0,), (1,), (0, 1)}
    weights = np.array(figures["tokens_in_document"]) / figures["tokens"]
    for line in lines.values():
        parts = [place["loss_increase_nats_per_token"] for place in line["by_place_in_document"]]
        assert line["loss_increase_nats_per_token"] == pytest.approx(parts @ weights, abs=1e-9)
        assert line["loss_increase_nats_per_token_standard_error"] < figures["loss_nats_per_token_standard_error"]
    said = capsys.readouterr().out
    assert "left out: no-cross in layers 0, 1 (bst: the same as zero)" in said
    assert "own-block" in said


def test_ablate_options_limit_documents_tokens_and_interventions(make_run, tmp_path):
    run_dir, path = make_run(documents="isolated"), tmp_path / "report.json"
    arguments = ["--interventions", "zero", "noise", "--layers", "1", "--documents", "3", "--tokens", "20"]
    assert main(["ablate", str(run_dir), *arguments, "--out", str(tmp_path / "a.pdf"), "--json", str(path)]) == 0
    (figures,) = json.loads(path.read_text())["corpora"]
    assert (figures["documents"], figures["tokens"]) == (3, 3 * 19)
    assert [(line["intervention"], line["layers"]) for line in figures["interventions"]] == [
        ("zero", [1]),
        ("noise:0.3", [1]),
        ("noise:1", [1]),
    ]
    assert (tmp_path / "a.pdf").read_bytes()[:4] == b"%PDF"


def test_a_figure_that_cannot_be_written_loses_no_number(make_run, tmp_path, no_room_for_figures, capsys):
    run_dir, path = make_run(), tmp_path / "report.json"
    arguments = ["--interventions", "zero", "--documents", "3", "--tokens", "20", "--json", str(path)]
    assert main(["ablate", str(run_dir), *arguments]) == 74
    assert "ablations.png: No space left on device" in capsys.readouterr().err
    assert json.loads(path.read_text())["corpora"][0]["interventions"]


def test_a_figure_in_no_directory_is_refused_before_the_model_is_read(make_run, monkeypatch, capsys):
    run_dir = make_run()
    (run_dir / "ablations.png").mkdir()
    monkeypatch.setattr("bst_dist.study.ablation.command.open_run", lambda *_: pytest.fail("read"))
    assert main(["ablate", str(run_dir)]) == 2
    assert "ablations.png exists and is not a regular file" in capsys.readouterr().err


def test_inapplicable_interventions_are_left_out_with_the_reason(make_run, make_model):
    trained = open_run(make_run())
    settings = dict(trained.recipe.model)

    def planned(mixer, layers=None, **changes):
        model = make_model(mixer, **changes)
        recipe = trained.recipe.model_copy(
            update={"model": trained.recipe.model.model_copy(update={"mixer": mixer, "depth": 3, "placement": [1, 2]})}
        )
        found, left_out = plan(Trained(trained.run_dir, recipe, 4, model), None, layers)
        return {str(intervention) for intervention, _ in found}, left_out

    assert settings["mixer"] == "bst"
    kinds, left_out = planned("block-recurrent")
    assert "no-cross" in kinds and "zero" in kinds and "delay:1" not in kinds
    assert "shuffle, delay in layers 1, 2 (block-recurrent: a recurrent state, made from the one before it)" in left_out
    kinds, left_out = planned("sliding")
    assert kinds == {"own-block", "no-self"}
    assert (
        left_out[0] == "zero, shuffle, delay, noise, replace, no-cross in layers 0, 1, 2 (sliding: no context states)"
    )
    kinds, left_out = planned("sliding", layers=["all"])
    assert kinds == {"own-block", "no-self"} and left_out
    kinds, _ = planned("bst", variant="MF")
    assert "no-cross" in kinds


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--interventions", "zeroo"], "no intervention 'zeroo'; there are: zero, shuffle"),
        (["--layers", "2"], "--layers 2: the model has 2 layers, 0 to 1; or all"),
        (["--layers", "-1"], "--layers -1: the model has 2 layers"),
        (["--documents", "0"], "--documents 0: read at least one"),
        (["--checkpoint", "3"], "no checkpoint of step 3; there are: 4"),
    ],
)
def test_invalid_ablate_options_give_one_message(make_run, capsys, arguments, said):
    arguments = [f"--layers={arguments[1]}"] if arguments[1] == "-1" else arguments
    assert main(["ablate", str(make_run()), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_missing_checkpoint_and_other_tokenizer_are_refused(make_run, capsys):
    assert main(["ablate", str(make_run(steps=()))]) == 2
    assert "checkpoint" in capsys.readouterr().err
    run_dir = make_run("other")
    (run_dir / "environment.json").write_text(json.dumps({"starts": [{"tokenizer_sha256": 64 * "0"}]}))
    assert main(["ablate", str(run_dir)]) == 2
    assert "its tokenizer" in capsys.readouterr().err


def test_ablation_without_applicable_interventions_is_refused(make_run, capsys):
    assert main(["ablate", str(make_run()), "--interventions", "no-cross", "--layers", "1", "--tokens", "9"]) == 0
    capsys.readouterr()
    run_dir = make_run("ssm")
    recipe = run_dir / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("mixer: bst", "mixer: bst-no-cross"))
    assert main(["ablate", str(run_dir), "--interventions", "zero"]) == 2
    assert "zero in layers 0, 1 (bst-no-cross: no context states)" in capsys.readouterr().err


def test_ctrl_c_keeps_the_finished_interventions(make_run, tmp_path, monkeypatch, capsys):
    run_dir, path, real = make_run(), tmp_path / "report.json", measure.increase
    monkeypatch.setattr(measure, "increase", lambda *args: os.kill(os.getpid(), signal.SIGINT) or real(*args))
    assert main(["ablate", str(run_dir), "--documents", "2", "--json", str(path)]) == 130
    report = json.loads(path.read_text())
    assert len(report["corpora"][0]["interventions"]) == 1
    assert (run_dir / "ablations.png").exists()
    assert "stopped: 1 of " in capsys.readouterr().out


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_token_ids_without_text_have_no_bits_per_byte(run_on_ids, tmp_path, capsys):
    path = tmp_path / "report.json"
    assert main(["ablate", str(run_on_ids), "--interventions", "zero", "--json", str(path)]) == 0
    (of,) = json.loads(path.read_text(), parse_constant=pytest.fail)["corpora"]
    figures = [(of, "bits_per_byte"), *((line, "bits_per_byte_increase") for line in of["interventions"])]
    assert [each[f"{name}{end}"] for each, name in figures for end in ("", "_standard_error")] == [None] * 8
    assert not {"nan", "inf"} & set(capsys.readouterr().out.split())


def test_a_negative_seed_is_refused_before_the_work(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["ablate", str(tmp_path), "--seed", "-1"])
    assert "argument --seed: -1 is less than 0" in capsys.readouterr().err
