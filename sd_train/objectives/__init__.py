"""What is learned: a batch becomes a loss for each sample."""
