"""Black-box distillation trainer: SeqKD, discriminator warmup, GAD."""
