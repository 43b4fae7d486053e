"""Length generalisation: loss by sequence length and by position."""
