"""Unlearning classes of trained runs: the methods by name, what is measured, and attacks."""
