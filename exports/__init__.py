"""Plans out: one file for each runtime, each with a receipt."""
