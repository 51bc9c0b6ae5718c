"""How good is this plan: what it costs on samples, with standard errors."""
