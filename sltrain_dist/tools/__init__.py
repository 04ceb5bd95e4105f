"""What the launchers call on what training left: weights out and in, generation, evaluation, checkpoints."""
