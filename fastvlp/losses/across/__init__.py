"""What the losses know about processes: who shares a batch, what they agree on, what travels, and in which order."""
