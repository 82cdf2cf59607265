"""gcdlite: GRPO with judgment training (GCD) for language-model agents, on one GPU or none."""

__version__ = "0.1.0"
