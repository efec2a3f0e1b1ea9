"""A real Slurm on one machine, and what becomes of trainings on it."""
