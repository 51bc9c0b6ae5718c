"""Graphs of ``torch.export`` as models: vetted, then rebuilt without running their code."""
