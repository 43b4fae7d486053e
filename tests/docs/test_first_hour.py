"""The mistakes shown in docs/first-hour.md give the messages on that page."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

from bst_dist import cli

PAGE = (Path(__file__).parents[2] / "docs" / "first-hour.md").read_text()


def test_the_recipe_is_valid_and_each_mistake_has_the_message_shown(tmp_path, corpus, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, recipe = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    Path("mine.yaml").write_text(recipe)
    Path("twice.yaml").write_text(recipe + "train: {steps: 300}\n")
    shutil.copytree(corpus, "corpora/mine")
    assert cli.main(["train", "mine.yaml", "--check"]) == 0
    assert "the recipe can be trained; nothing was started" in capsys.readouterr().out
    shown = PAGE.partition("Ten mistakes")[2].split("```")[1].strip().splitlines()
    commands, messages = shown[::2], shown[1::2]
    assert len(commands) == 10
    for command, message in zip(commands, messages, strict=True):
        _, _, *words = shlex.split(command, comments=True)
        assert cli.main(words) == 2, command
        assert capsys.readouterr().err.strip() == message.replace("/home/ada/first", str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpora", "mine.yaml", "twice.yaml"]
