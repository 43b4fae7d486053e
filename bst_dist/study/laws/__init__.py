"""Numbers in, judgement out: forms, fits, intervals, gaps and the verdict; nothing here knows a run."""
