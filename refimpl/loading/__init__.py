"""From a name to a model that answers: where its files are, and how they become a network on a backend."""
