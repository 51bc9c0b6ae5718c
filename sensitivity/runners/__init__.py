"""Runners: execute a model with some layers quantized."""
