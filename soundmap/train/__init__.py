"""Training: data sets, augmentation, losses and the loop that makes a bundled model."""
