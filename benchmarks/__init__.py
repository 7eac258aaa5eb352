"""What the service costs and what early stopping saves, each against something measured in the same run."""
