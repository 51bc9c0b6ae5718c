"""Plans out: one file for each runtime, each with an export report."""
