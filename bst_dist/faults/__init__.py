"""What a run does when something breaks: signals, watchdog, guard against bad steps, exit codes."""
