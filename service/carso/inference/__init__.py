"""The two-pass pipeline: the vote, the ONNX graphs, and the engine that runs them for all requests in flight."""
