"""Text generation from a trained model, token by token."""
