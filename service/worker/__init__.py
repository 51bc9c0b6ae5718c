"""Processes that carry jobs out: supervisor, driver, evaluators, and the engines they run on."""
