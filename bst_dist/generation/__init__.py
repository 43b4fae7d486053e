"""Text from a trained model, a token at a time."""
