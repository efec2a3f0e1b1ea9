"""Trainings on a real Slurm on one machine."""
