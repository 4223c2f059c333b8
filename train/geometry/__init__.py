"""The latent geometry of trained runs: what `train.analyze` measures and draws."""
