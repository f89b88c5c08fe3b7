"""What a submission is worth: the resident model, the evaluation data, losses, copies, and pay.

May import: `evaluation.baseline`, `evaluation.reading`, `evaluation.records`. Modules that import torch are imported by
the evaluator alone, in the thread of the model.
"""
