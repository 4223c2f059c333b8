"""Distillation of a pretrained run."""
