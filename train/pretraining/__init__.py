"""One denoiser on one data set: what `train.pretrain` trains."""
