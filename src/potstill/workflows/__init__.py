"""Studies and main jobs, composed of sampling, labelling, training, evaluation and reports."""
