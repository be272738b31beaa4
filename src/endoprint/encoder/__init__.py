"""What the encoders share: backbone, minibatches, training loop, pre-training."""
