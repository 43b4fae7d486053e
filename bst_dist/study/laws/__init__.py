"""Scaling laws, fits, intervals, gaps and the verdict: functions of numbers, independent of run directories."""
