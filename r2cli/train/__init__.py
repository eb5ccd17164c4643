"""Training: the loop that all methods share, range regularization, and the state that a stopped run resumes from."""
