"""A language with known truth: a stochastic teacher grammar, and measures against its exact probabilities."""
