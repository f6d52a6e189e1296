"""Real text: a pretrained student, a real teacher's answers, and judges apart from training."""
