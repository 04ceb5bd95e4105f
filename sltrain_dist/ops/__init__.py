"""Maths only: operators with schema, fake, autograd and a plain torch reference. No modules, no processes."""
