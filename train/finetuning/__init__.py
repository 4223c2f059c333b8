"""Fine-tuning of trained runs: what the commands build, measure and compare."""
