"""Studies and main jobs, composed of sampling, labeling, training, evaluation and reports."""
