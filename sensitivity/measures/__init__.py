"""Measures of the loss itself; simpler metrics are in ``bitquota.sensitivity.metrics``."""
