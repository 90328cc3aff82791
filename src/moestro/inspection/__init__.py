"""What a checkpoint is, what can be trained of its routing, and how it routes a text."""
