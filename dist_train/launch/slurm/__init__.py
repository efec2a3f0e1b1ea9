"""Slurm: commands, batch scripts, checks before a job is queued, preemption."""
