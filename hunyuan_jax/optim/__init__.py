"""Learning-rate schedules, parameter groups and the AdamW chain built from them."""
