"""``bitquota check``: plans kept in git and held to their limits."""
