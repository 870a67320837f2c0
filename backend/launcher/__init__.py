"""One tritonserver as a child of this process: found, started, watched, ended. Knows no model and imports no torch."""
