"""What a run reports: metrics, performance, TensorBoard, profiles, looks into the model."""
