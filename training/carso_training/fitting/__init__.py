"""Training: one loop for all networks, and what each of them is trained on."""
