"""A run imports neither torch's compiler nor MLflow, and its optimizer steps like torch's own."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import importlib.util, sys
from bst_dist.train.__main__ import main

assert main(sys.argv[1:]) == 0
print("loaded:", *sorted({"torch._dynamo", "torch._inductor", "sympy", "mlflow", "pandas"} & sys.modules.keys()))
import torch

def stepped():
    weights, hooked = torch.nn.Parameter(torch.arange(1.0, 4.0)), []
    optimizer = torch.optim.AdamW([weights], lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: hooked.append(torch.is_grad_enabled()))
    def loss():
        optimizer.zero_grad()
        with torch.enable_grad():
            weights.square().sum().backward()
        return hooked
    assert optimizer.step(loss) is hooked and optimizer.step(loss) is hooked
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    return weights.detach(), optimizer.state_dict()["state"][0]["exp_avg_sq"], hooked

without = stepped()
assert "torch._dynamo" not in sys.modules
import torch._dynamo
for one, other in zip(without, stepped()):
    assert torch.equal(torch.as_tensor(one), torch.as_tensor(other)), (one, other)
disable = torch.optim.Optimizer.add_param_group.__wrapped__.__dynamo_disable
assert disable.__module__ != "bst_dist.parallel.deepspeed_import"
assert importlib.util.find_spec("mlflow")
"""


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_run_loads_no_compiler_and_its_optimizer_equals_one_with_it(recipe_file, tmp_path, kind):
    recipe = recipe_file(optimizer={"kind": kind})
    words = [sys.executable, "-c", PROGRAM, recipe, "--run-dir", tmp_path / "run"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "loaded:\n" in done.stdout
