"""The model: pure functions of arrays, and flax modules that declare the parameters they use."""
