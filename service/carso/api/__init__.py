"""The endpoints: the native API and the Open Inference Protocol."""
