"""What all recipes share: data, configuration, the loop, sampling, measuring, pictures."""
