"""Trains the sample models that no package ships, each in a process of its own. It knows neither cache nor server."""
