"""Several processes that serve at one port: who starts them, who replaces them, and where they run."""
