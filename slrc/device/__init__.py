"""Other machines, reached over ssh: bundles of models, the way there, jobs that run there, and what came back."""
