"""The parts a model is made of."""
