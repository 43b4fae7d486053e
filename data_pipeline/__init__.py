"""The data pipeline: from raw corpora to tokens that are sharded by sequence and resumed exactly.

It knows no models.
"""
