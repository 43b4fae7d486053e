"""Distributed pretraining of Block-State Transformers."""
