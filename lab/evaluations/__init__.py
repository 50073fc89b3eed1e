"""Evaluations: plain numbers, what they measure, which way is better, where they come from."""
