"""What each part of a trained model carries."""
