"""What is asked of trained models: evaluation, experiments, sweeps and their laws."""

import os

# Evaluation often runs beside training, on the same cores. OpenMP's threads spin while they wait for work, which then
# takes the cores from those that have some (measured: 50 times slower); it must be told before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
