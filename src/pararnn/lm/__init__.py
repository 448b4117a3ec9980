"""Language models on top of `pararnn.RNN`: models, data, training, evaluation, benchmarks."""
