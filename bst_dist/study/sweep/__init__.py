"""The scaling study: its design, its table, its report."""
