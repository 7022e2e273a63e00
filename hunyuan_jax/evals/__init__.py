"""Evaluates a model: RULER, needles, perplexity, and the tasks of lm-eval."""
