"""HTTP: routes, bodies, callers, and errors as problem+json."""
