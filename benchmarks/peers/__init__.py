"""Other serving frameworks, with the same system behind them. `python -m benchmarks.peers` compares them."""
