"""Evaluation of a trained model: its figures on held-out data, and what makes them readable."""
