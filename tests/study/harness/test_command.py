from __future__ import annotations

import importlib.util
import json
import math

import pytest

from bst_dist.cli import main
from bst_dist.study.evaluation.trained import open_run, tokenizer_of

pytest.importorskip("lm_eval")
from bst_dist.study.harness.command import HarnessError, require_known
from bst_dist.study.harness.model import HarnessModel
from tests.generation.decoder import Decoder

CHOICES = [
    {"context": f"naïve café {i} for x", "choices": [" = (", " return", " 😀"], "answer": i % 3} for i in range(7)
]
TEXTS = [{"text": "naïve café for x = ( ) return é " * (i + 1)} for i in range(4)]
PROMPTS = [{"prompt": f"for x {i}"} for i in range(3)]
TASKS = {
    "which": (
        "multiple_choice",
        CHOICES,
        ["acc"],
        {"doc_to_text": "{{context}}", "doc_to_choice": "choices", "doc_to_target": "answer"},
    ),
    "rolling": ("loglikelihood_rolling", TEXTS, ["bits_per_byte"], {"doc_to_text": "", "doc_to_target": "{{text}}"}),
    "writing": (
        "generate_until",
        PROMPTS,
        ["exact_match"],
        {
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5},
        },
    ),
}


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Function that writes a directory of the three tasks, as JSON, which is also YAML."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()

    def write(**examples) -> str:
        for name, (kind, own, metrics, fields) in TASKS.items():
            path = folder / f"{name}.jsonl"
            path.write_text("".join(json.dumps(each) + "\n" for each in examples.get(name, own)))
            task = {
                "task": name,
                "output_type": kind,
                "dataset_path": "json",
                "test_split": "test",
                "dataset_kwargs": {"data_files": {"test": str(path)}},
                "target_delimiter": "",
                "metric_list": [{"metric": metric} for metric in metrics],
                **fields,
            }
            (folder / f"{name}.yaml").write_text(json.dumps(task))
        return str(folder)

    return write


def greedy(run_dir, prompt: str, count: int) -> str:
    trained = open_run(run_dir)
    tokenizer, decoder, written = tokenizer_of(run_dir, trained.recipe), Decoder(trained.model), []
    logits = decoder.read([tokenizer.eos_id, *tokenizer.encode(prompt).tolist()])
    while len(written) < count:
        logits[:3] = -math.inf  # padding, unknown, begin
        written.append(int(logits.argmax()))
        if written[-1] == tokenizer.eos_id:
            break
        logits = decoder.read(written[-1:])
    return tokenizer.decode(written)


def test_harness_reports_tasks_of_every_kind(make_run, tasks, tmp_path, capsys):
    run_dir, out = make_run(), tmp_path / "report.json"
    answers = [greedy(run_dir, each["prompt"], 5).split("\n")[0] for each in PROMPTS]
    answers[-1] += "?"  # one wrong
    folder = tasks(writing=[{**each, "answer": answer} for each, answer in zip(PROMPTS, answers, strict=True)])
    names = ["--harness", "which,rolling,writing", "--harness-tasks", folder]
    assert main(["eval", str(run_dir), *names, "--json", str(out)]) == 0
    report = {task["task"]: task for task in json.loads(out.read_text())["tasks"]}

    trained = open_run(run_dir)
    model = HarnessModel(trained, tokenizer_of(run_dir, trained.recipe))
    right = 0
    for each in CHOICES:
        pairs = [model._encode_pair(each["context"], choice) for choice in each["choices"]]
        values = [nats_of(trained.model, *pair) for pair in pairs]
        right += min(range(3), key=values.__getitem__) == each["answer"]
    assert report["which"]["metrics"]["acc"] == pytest.approx(right / len(CHOICES))
    nats = sum(nats_of(trained.model, [3], model.text.encode(each["text"]).tolist()) for each in TEXTS)
    size = sum(len(each["text"].encode()) for each in TEXTS)
    assert report["rolling"]["metrics"]["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert report["writing"]["metrics"]["exact_match"] == pytest.approx(2 / 3)
    assert [report[name]["examples"] for name in TASKS] == [7, 4, 3]
    assert "bits_per_byte" in capsys.readouterr().out


def nats_of(model, context: list[int], continuation: list[int]) -> float:
    """Return the nats of a continuation, from one forward pass with padding at the end."""
    import torch

    inputs = (context + continuation)[:-1]
    padding = [0] * (-len(inputs) % model.config.block)
    labels = (context + continuation)[1:] + padding
    with torch.no_grad():
        losses = model(torch.tensor([inputs + padding]), torch.tensor([labels])).per_token[0]
    return float(losses[len(context) - 1 : len(inputs)].sum())


def test_missing_task_files_or_package_give_one_message(make_run, tasks, tmp_path, capsys, monkeypatch):
    run_dir, folder = str(make_run()), tasks()

    def refused(*options) -> str:
        assert main(["eval", run_dir, *options]) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    (tmp_path / "empty").mkdir()
    assert "no task there" in refused("--harness", "which", "--harness-tasks", str(tmp_path / "empty"))
    (tmp_path / "tasks" / "which.jsonl").unlink()
    assert "the harness could not do which: " in refused("--harness", "which", "--harness-tasks", folder)
    assert "--corpus does not apply to this evaluation" in refused("--harness", "which", "--corpus", "x")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "lm_eval is not installed: pip install 'bst-dist[harness]'" in refused("--harness", "which")


def test_unknown_task_name_error_suggests_similar_names():
    with pytest.raises(HarnessError, match=r"--harness hellaswak: no task of that name. did you mean hellaswag\?"):
        require_known(["arc_easy", "hellaswag"], ["arc_easy", "hellaswak"])
