"""The endpoints: the only place where http meets model, chain and submissions.

May import: `http`, `model`, `chain`, `submissions`, `payload`, `config`, `errors`.
"""
