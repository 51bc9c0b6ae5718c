"""Who may call, and what keeps strangers' files and code within bounds."""
