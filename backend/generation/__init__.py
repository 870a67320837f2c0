"""The thinking: which tokens to compute next. Imports neither torch nor Triton."""
