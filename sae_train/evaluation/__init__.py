"""Figures of an exported SAE on held-out activations; every metric has its one definition here.

To add a metric:

1. Write a class of `metric.Metric` in a file of its own, such as `fidelity.py`. Its docstring defines each figure.
2. Add the class to `METRICS` in `registry.py`. summary.json and sae.json then hold its figures.
3. Name in `in_rows` the figures that metrics.jsonl and wandb should show as `eval/NAME`.
4. Add a test against a slow definition to tests/evaluation, and a line to the table in docs/metrics.md.

`evaluate.py` is the loop over held-out batches. `sharded_forward.py` runs an SAE whose features are spread over ranks.
`density.py` holds figures of firing densities, which training reports, too.
"""
