"""Questions to one trained run: its loss on documents, text from its model."""
