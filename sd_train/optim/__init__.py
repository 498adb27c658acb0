"""Registries of optimizers and learning-rate schedules; their names can be read without torch."""
