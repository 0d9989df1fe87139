"""Accuracy of a method at a budget, on questions in LLaVA's format, with intervals; resumable."""
