"""Running a model: logits, sampling, generation with the one-entry-per-group cache."""
