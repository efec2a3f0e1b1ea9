"""Evaluation, prediction and export of a trained net."""
