"""A run from command line to trained model: settings, build, loop, evaluation, checkpoints, records."""
