"""TensorBoard reads the expected values from a run's events, and a run is the same with and without them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from bst_base.settings import parse
from bst_dist.checkpoint import rng
from bst_dist.config import Recipe
from bst_dist.model.probes import kernels, time_scales
from bst_dist.report.config import LogConfig
from bst_dist.report.metrics import ProbeReport, SkippedReport, StepReport
from bst_dist.report.probes import Probes
from bst_dist.report.tensorboard import FOLDER, HPARAMS, RESULTS, SHOWN, TensorBoard, hparams
from bst_dist.study.evaluation.trained import open_run
from data_pipeline.serve.reader import Corpus

Go = Callable[..., None]


def events(run_dir: Path) -> EventAccumulator:
    found = EventAccumulator(str(run_dir / FOLDER), size_guidance={"scalars": 0, "tensors": 0, "histograms": 0})
    return found.Reload()


def report(step: int) -> StepReport:
    return StepReport(
        step=step,
        tokens=100 * step,
        loss_nats=1.0 / step,
        bits_per_byte=math.nan,
        gradient_norm=1.0,
        learning_rate=1e-3,
        ssm_learning_rate=1e-3,
        step_time_s=2.0,
        tokens_per_s=50.0,
        mfu=0.5,
    )


def texts(found: EventAccumulator) -> list[tuple[int, str]]:
    return [(e.step, e.tensor_proto.string_val[0].decode()) for e in found.Tensors("sample/text_summary")]


def test_tensorboard_reads_the_written_values(tmp_path):
    board = TensorBoard(tmp_path, 0, {"model.width": 16})
    board.write(report(1))
    board.write(SkippedReport(**vars(report(2))))
    board.write_probes(
        ProbeReport(1, {"context/layer 01": 0.25}, {"scales/layer 01": torch.tensor([0.0, 1.0, 2.5])}, "# not a title")
    )
    board.close()
    found = events(tmp_path)
    assert [(e.step, e.value) for e in found.Scalars("train/loss_nats")] == [(1, 1.0)]
    assert found.Scalars("context/layer 01")[0].value == 0.25
    assert "train/bits_per_byte" not in found.Tags()["scalars"]  # nan
    histogram = found.Histograms("scales/layer 01")[0].histogram_value
    assert (histogram.num, histogram.min, histogram.max) == (3, 0.0, 2.5)
    assert texts(found) == [(1, "# not a title")]


@pytest.mark.parametrize("starts", [((0, (1, 2, 3)), (2, (3, 4))), ((0, (1, 2, 3)), (0, (1, 2, 3, 4)))])
def test_restarted_run_hides_events_after_its_checkpoint(tmp_path, starts):
    for start, steps in starts:
        board = TensorBoard(tmp_path, start, {})
        for step in steps:
            board.write(report(step))
        board.close()
    assert [e.step for e in events(tmp_path).Scalars("train/loss_nats")] == [1, 2, 3, 4]


def test_hparams_columns_are_the_same_for_every_run(settings, tmp_path):
    bst = hparams(parse(Recipe, settings), parameters=7)
    sliding = hparams(parse(Recipe, {**settings, "model": {**settings["model"], "mixer": "sliding"}}), parameters=5)
    assert list(bst) == list(sliding) == [*HPARAMS, "parameters"]
    assert (bst["model.context.variant"], bst["model.ssm.kernel"], bst["model.width"]) == ("SH", "s4d", 16)
    assert sliding["model.context.variant"] == sliding["model.ssm.kernel"] == "-"
    TensorBoard(tmp_path, 0, bst).close()
    plugin = events(tmp_path).summary_metadata
    data = {tag: HParamsPluginData.FromString(m.plugin_data.content) for tag, m in plugin.items()}
    experiment = data["_hparams_/experiment"].experiment
    assert {info.name for info in experiment.hparam_infos if info.differs} == set(SHOWN)
    assert [metric.name.tag for metric in experiment.metric_infos] == list(RESULTS)
    start = data["_hparams_/session_start_info"].session_start_info
    assert start.hparams["parameters"].number_value == 7
    assert data["_hparams_/session_end_info"].session_end_info.status == 1  # success


@pytest.fixture
def go(recipe_file, train_in) -> Go:
    """Train the small recipe; see `train_in`."""
    return train_in(recipe_file(train={"precision": "bf16", "sequences": 8, "micro_sequences": 2}))


@pytest.mark.parametrize(
    ("ranks", "every", "wanted"),
    [
        (1, 500, list(range(500, 10_001, 500))),
        (2, 4, [4, *range(8, 10_001, 8)]),  # a sample of 64 tokens in 8 steps
        (512, 500, [500, 2500, 4500, 6500, 8500, 10_000]),  # in 2,048 steps
        (512, 4000, [4000, 8000, 10_000]),
        (512, 0, [10_000]),
    ],
)
def test_samples_are_rarer_with_more_ranks(ranks, every, wanted):
    probes = SimpleNamespace(
        sampling=True,
        config=LogConfig(sample_tokens=64),
        ranks=SimpleNamespace(world=ranks),
        _every=every,
        _steps=10_000,
    )
    evaluated = [step for step in range(1, 10_001) if step == 10_000 or (every and step % every == 0)]
    assert [step for step in evaluated if Probes.samples(probes, step)] == wanted


WATCHED = ("log.tensorboard=true", "log.sample_tokens=12")


@pytest.mark.ranks
@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(
    "changes",
    [
        ("deepspeed=ds_configs/zero2.json", "activation_checkpointing.policy=every-layer"),
        ("deepspeed=ds_configs/zero3.json", "parallel.sp=2", "model.context.variant=MF"),
        ("deepspeed=ds_configs/zero1.json", "data.mode=streaming", "train.carry=true"),
    ],
    ids=["zero2", "zero3-sp2", "carry"],
)
def test_probes_do_not_change_a_run_and_resume_correctly(go, assert_same_run, tmp_path, changes):
    go("plain", *changes, world=2)
    go("watched", *changes, *WATCHED, world=2)
    assert_same_run(tmp_path / "plain", tmp_path / "watched")
    go("parts", *changes, *WATCHED, world=2, until=4)
    go("parts", *changes, *WATCHED, world=2, resume=True)
    assert_same_run(tmp_path / "plain", tmp_path / "parts")
    whole, parts = events(tmp_path / "watched"), events(tmp_path / "parts")
    names = [name for name in whole.Tags()["scalars"] if name.startswith("context")]
    assert len(names) == 2
    for name in names:
        values = [[(e.step, e.value) for e in found.Scalars(name)] for found in (whole, parts)]
        assert values[0] == values[1]
        assert [step for step, _ in values[0]] == [3, 6]
        assert all(0 < value < 1 for _, value in values[0])
    (name,) = whole.Tags()["histograms"]
    kernel = kernels(open_run(tmp_path / "plain").model)[1]
    histogram = whole.Histograms(name)[-1].histogram_value
    assert histogram.num == time_scales(kernel).numel()
    assert histogram.max == pytest.approx(float(time_scales(kernel).log10().max()), rel=1e-6)
    if "deepspeed=ds_configs/zero3.json" in changes:
        assert "sample/text_summary" not in whole.Tags()["tensors"]
    else:
        assert texts(whole) == texts(parts)
        assert len(texts(whole)) == 2


@pytest.mark.ranks
@pytest.mark.usefixtures("unmeasured")
def test_probe_values_do_not_depend_on_sequence_parallelism(go, tmp_path):
    changes = (
        *WATCHED,
        "train.precision=fp32",
        "evaluation.sequences=2",
        "train.micro_sequences=2",
        "train.steps=2",
        "log.sample_tokens=0",
    )
    go("one", *changes)
    go("two", *changes, "parallel.sp=2", world=2)
    one, two = events(tmp_path / "one"), events(tmp_path / "two")
    assert "sample/text_summary" not in one.Tags()["tensors"]
    (name,) = (name for name in one.Tags()["scalars"] if name.startswith("context share"))
    assert one.Scalars(name)[0].value == pytest.approx(two.Scalars(name)[0].value, rel=1e-5)


@pytest.mark.ranks
@pytest.mark.usefixtures("unmeasured")
def test_disabled_probes_write_only_training_curves(go, tmp_path):
    go("run", "log.tensorboard=true", "log.probes=false", "log.sample_tokens=0", until=3)
    tags = events(tmp_path / "run").Tags()
    assert {name.split("/")[0] for name in tags["scalars"]} == {"train", "validation"}
    assert not tags["histograms"] and not tags["tensors"]


@pytest.mark.ranks
@pytest.mark.usefixtures("unmeasured")
def test_probes_do_not_change_generators_or_the_model(go, tmp_path, monkeypatch):
    report = Probes.report

    def checked(self: Probes, step: int) -> None:
        model, device = self.engine.module, self.ranks.device
        before, training, weights = rng.capture(device), model.training, [p.clone() for p in model.parameters()]
        report(self, step)
        after = rng.capture(device)
        assert before["python"] == after["python"]
        assert torch.equal(before["torch"], after["torch"])
        assert all(np.array_equal(one, other) for one, other in zip(before["numpy"], after["numpy"], strict=True))
        assert model.training == training
        assert all(map(torch.equal, weights, model.parameters()))
        assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())
        (tmp_path / f"looked-{step}").touch()

    monkeypatch.setattr(Probes, "report", checked)
    go("run", *WATCHED)
    assert (tmp_path / "looked-3").exists() and (tmp_path / "looked-6").exists()


@pytest.mark.ranks
@pytest.mark.usefixtures("unmeasured")
def test_sample_prompt_comes_from_a_single_document(go, tmp_path):
    go("run", *WATCHED, "data.documents=isolated", "train.steps=1", "schedule.warmup_steps=1", "evaluation.sequences=2")
    run_dir = tmp_path / "run"
    corpus = Corpus.open(open_run(run_dir).recipe.data.corpus, "validation")
    documents = [corpus.tokenizer().decode(corpus.document(i)) for i in range(len(corpus))]
    ((step, sample),) = texts(events(run_dir))
    read = sample.split("\n\n")[1].replace("\n    ", "\n")[4:]
    assert step == 1
    assert any(read in document for document in documents)
