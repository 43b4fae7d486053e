"""Scaling sweeps: design, budget, power, table and report."""
