"""Post-training: objectives that start from a trained model."""
