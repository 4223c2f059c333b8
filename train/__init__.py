"""Runnable recipes: `python -m train.pretrain`, `python -m train.sample`."""
