"""Studies of trained models: evaluation, experiments, sweeps and scaling laws."""

import os

# Evaluation often runs beside training, on the same cores. By default, waiting OpenMP threads spin and take these cores
# from threads that have work (measured: 50 times slower). The variable must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
