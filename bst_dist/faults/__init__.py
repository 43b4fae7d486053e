"""Fault handling of a run: signals, the watchdog, the lease, the guard against bad steps, exit codes."""
